"""A report as one HTML file: words and figures, self-contained, that asks nobody for anything when it is opened."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from .drawing import literal

# Whatever a name in the data may hold, the browser may load nothing but what stands in the page.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:1200px;margin:2em auto;padding:0 1em}"
    "pre{font:13px/1.45 ui-monospace,monospace;background:#f6f7f9;padding:1em;overflow-x:auto}"
    "h1{font-size:1.5em;overflow-wrap:anywhere}figure{margin:1.5em 0;break-inside:avoid}figcaption{color:#555}"
    "@media print{body{max-width:none;margin:0}pre{font-size:9px;white-space:pre-wrap;overflow:visible}}"
)


def html_page(title: str, words: str, figures: Sequence[tuple[go.Figure, str]] = ()) -> str:
    """The page of a report: a title, figures each with what it shows in words, then the text page as it stands.

    Words are shown letter by letter. The drawing code (about 4.8 MB) is in the page once, where there is a figure.
    """
    drawn = []
    for i, (figure, alt) in enumerate(figures):
        body = (
            go.Figure(figure)
            .update_layout(template="plotly_white")
            .to_html(full_html=False, include_plotlyjs=i == 0, config={"displaylogo": False}, div_id=f"figure-{i}")
        )
        label = html.escape(alt, quote=True)
        drawn.append(f'<figure role="img" aria-label="{label}">{body}<figcaption>{literal(alt)}</figcaption></figure>')
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{literal(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{literal(title)}</h1>",
            *drawn,
            f'<pre tabindex="0">{literal(words)}</pre>',  # the keyboard scrolls it sideways
            "</body></html>",
            "",
        ]
    )
