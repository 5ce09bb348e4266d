"""Pages to read a run or an evaluation by: HTML files that need no network."""
