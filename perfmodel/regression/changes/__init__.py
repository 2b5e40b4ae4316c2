"""What a change of time between two captures consists of: parts of the latency that take longer."""
