"""perfmodel: trace analysis and roofline performance models for Mixture-of-Experts inference with offloaded experts.

Importing this package loads nothing else, so that `collectors/` can use the record modules where only torch and
numpy are installed. Import what you need: `from perfmodel.readers import read_trace`.
"""

__version__ = "0.1.0"
