"""Baselines that are saved as text files: kept, read back, looked up, replaced."""

from .lookup import listed, named
from .restored import load
from .saving import Saving, save, update
from .shown import row_of, shown, shown_workload
from .stored import read

__all__ = ["Saving", "listed", "load", "named", "read", "row_of", "save", "shown", "shown_workload", "update"]
