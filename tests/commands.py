"""Commands as a person runs them, but in this process: most take less time than another takes to import the library."""

import contextlib
import io
import subprocess
import sys
from unittest import mock

from perfmodel.cli.main import main
from tests.conftest import ROOT


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """`perfmodel` with these words from the root of the project: exit code, stdout and stderr, errors and all."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["perfmodel", *words]),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(words, code if isinstance(code, int) else int(code is not None), *said)
