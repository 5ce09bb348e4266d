"""What a run would take of GPUs that are not there: memory by phase, operations, seconds of a step."""
