"""Regression: a candidate against a baseline, and against the model."""

import frame

frame.header("Regression", "Is this machine, driver or build as fast as it was, and as it should be?")
