"""What every run stands on, whatever the method: files, errors, settings, checkpoints."""
