"""What every command stands on, whatever the method; README.md has a line for each file."""
