"""Pictures that commands about expert-parallel layers write."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perfmodel.cli.shell import note
from perfmodel.errors import InputError, MissingExtraError
from perfmodel.files import write_whole

if TYPE_CHECKING:
    from perfmodel.schedule.drawn import Panel


def check_figure(path: str | None) -> None:
    """Refuse a picture that cannot be written before anything is computed."""
    if path is not None and (not path.endswith(".html") or not Path(path).resolve().parent.is_dir()):
        raise InputError(f"--figure is {path!r}, expected an .html file in a folder that exists")


def draw(path: str, panels: "Sequence[Panel]", title: str, member: str = "GPU") -> None:
    """Write who does what when as a page that needs nothing else; raises MissingExtraError without Plotly."""
    try:
        from perfmodel import figures
    except ImportError:
        raise MissingExtraError(
            'a picture needs plotly, which is not installed: pip install "perfmodel[figures]"'
        ) from None
    page = figures.gantt(panels, title, member).to_html(include_plotlyjs=True, full_html=True)
    write_whole(path, page.encode())
    note(f"wrote {path}")
