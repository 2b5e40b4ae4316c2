"""Pages as Markdown: paragraphs of even width, tables, and words of others in which Markdown finds nothing."""

import re
import textwrap
from collections.abc import Sequence

from perfmodel import text

WIDTH = 132
N_SENTENCE = 600  # letters of a sentence, which holds names of others


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


def code(words: str, n_most: int) -> str:
    """Words as a code span in a cell of a table: one line, no backtick, no bar, which ends a cell even there."""
    shown = text.shortened(words, n_most).replace("`", "'").replace("|", "¦")
    return f"`{shown}`" if shown.strip() else ""


def plain(words: str, n_most: int = N_SENTENCE) -> str:
    """A sentence with names in it as one line in which Markdown finds nothing."""
    shown = text.shortened(" ".join(words.split()), n_most)
    return re.sub(r"([\\`*_\[\]<>&|~#@!$])", lambda found: f"&#{ord(found[1])};", shown)


def folded(title: str, body: str) -> str:
    """A block that opens by its title."""
    return f"<details><summary>{plain(title)}</summary>\n\n{body}\n</details>"
