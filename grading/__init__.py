"""Is this answer right? Mathematical answers, option letters, and the processes that compare them."""
