"""The command line: each command loads, makes one call, prints. Data on stdout, progress and errors on stderr."""

from perfmodel.cli.main import main

__all__ = ["main"]
