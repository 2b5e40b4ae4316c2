"""Schedules: bulk, chunked and fused expert-parallel layers."""

import frame

frame.header("Schedules", "Which schedule of an expert-parallel layer is fastest, and why?")
