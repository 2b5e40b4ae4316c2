"""A machine that has just arrived: what is healthy, what is not, and what to look at."""
