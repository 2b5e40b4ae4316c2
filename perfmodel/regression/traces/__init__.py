"""Traces as sides of a comparison: what a step is, what it consists of, what moved in it."""
