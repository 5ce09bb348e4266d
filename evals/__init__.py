"""Sets of problems in, figures out."""
