"""Pages of documentation as Markdown: paragraphs of even width, tables."""

import textwrap
from collections.abc import Sequence

WIDTH = 132


def wrapped(block: str) -> str:
    """A paragraph or item in lines of WIDTH; tables and headings as they are."""
    block = block.strip("\n")
    if block.startswith(("|", "#")):
        return block
    indent = "   " if block[:1].isdigit() else ""
    return textwrap.fill(
        " ".join(block.split()), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows below their heads as a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
