"""The dashboard as an ASGI application: Streamlit's pages with the headers that browsers guard them by.

`perfmodel app` runs it with `streamlit run`, which docs/deployment.md says how to put before others.
"""

import base64
import hashlib
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import streamlit as st
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def _inline_scripts() -> list[str]:
    """The scripts in Streamlit's own page, each by its digest as a policy names it: no other inline script runs."""
    page = (Path(st.__file__).parent / "static" / "index.html").read_bytes()
    found = re.findall(rb"<script(?![^>]*\ssrc)[^>]*>(.*?)</script>", page, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in found]


# Scripts: Streamlit's own files, one of which has WebAssembly in it; none is made from words: no figure may be of
# WebGL, which Plotly compiles. Images: what figures draw. Nothing from anywhere else, so that a name in an uploaded
# trace can make no browser ask for anything.
_POLICY = "; ".join(
    [
        "default-src 'self'",
        " ".join(["script-src 'self' 'wasm-unsafe-eval'", *_inline_scripts()]),
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "frame-src 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
# What the server tells of itself: names of caches, numbers of sessions and bytes. Health is still open.
CLOSED = ("/_stcore/metrics",)


class Guard:
    """Adds HEADERS to every response, closes CLOSED, and refuses sockets that pages of other sites open.

    Streamlit would allow pages that come from the machine's own address, and asks a server on the internet which that
    is; nothing here asks anything outside.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket" and not _is_own_page(Headers(scope=scope)):
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"].endswith(CLOSED):
            await PlainTextResponse("Not here", 404)(scope, receive, _with_headers(send))
        else:
            await self.app(scope, receive, _with_headers(send))


def _is_own_page(headers: Headers) -> bool:
    """Whether a page of this server opens a socket, under a name that is allowed; programs name no page.

    A page that hides where it is from (`null`, as in a frame that others made) is no page of this server.
    """
    if "origin" not in headers:
        return True
    try:
        origin = urlsplit(headers["origin"])
    except ValueError:
        return False
    is_allowed = origin.hostname in st.config.get_option("server.allowedHosts")
    return origin.scheme in ("http", "https") and (origin.netloc == headers.get("host") or is_allowed)


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *own]
        await send(message)

    return sent


@asynccontextmanager
async def _warmed(_: Any) -> AsyncIterator[None]:
    threading.Thread(target=_warm, name="warm", daemon=True).start()
    yield


def _warm() -> None:
    """Load what first pages need while the first browser still loads its scripts."""
    import_module("perfmodel.figures")  # and with it Plotly
    import_module("loading").shipped()
    import_module("uploads").offered()


app = st.App(Path(__file__).parent / "main.py", lifespan=_warmed, middleware=[Middleware(Guard)])
