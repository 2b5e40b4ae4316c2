"""A session of the dashboard without a browser: the messages that Streamlit's page and server exchange, as far as tests
and measurements of many sessions need them."""

import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.sync.client import connect

_XSRF = "_streamlit_xsrf"


class Session:
    """One user with one page open; `words` is all that it shows letter by letter."""

    def __init__(self, url: str, page: str, query: str = "") -> None:
        self.url, self.page, self.query = url, page, query
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with self.opener.open(f"{url}/_stcore/health") as answer:
            cookies = answer.headers.get_all("set-cookie") or []
        self.token = next(c.split(";")[0].split("=", 1)[1] for c in cookies if c.startswith(_XSRF))
        self.closing = ExitStack()
        self.socket = self.closing.enter_context(
            connect(
                url.replace("http", "ws") + "/_stcore/stream",
                subprotocols=["streamlit", self.token],  # type: ignore[list-item]
                additional_headers={"Cookie": f"{_XSRF}={self.token}"},
                max_size=2**28,
                proxy=None,
            )
        )
        self.session_id = ""
        self.elements: list[Any] = []
        self.states: dict[str, WidgetState] = {}
        self.run()

    def close(self) -> None:
        """Leave."""
        self.closing.close()

    def run(self, timeout_s: float = 120) -> float:
        """Run the page with the state of its widgets; how many seconds until it was whole."""
        message = BackMsg()
        message.rerun_script.query_string = self.query
        message.rerun_script.page_name = self.page
        message.rerun_script.widget_states.widgets.extend(self.states.values())
        began = time.monotonic()
        self.socket.send(message.SerializeToString())
        while time.monotonic() - began < timeout_s:
            answer = ForwardMsg()
            answer.ParseFromString(self.socket.recv(timeout_s))  # type: ignore[arg-type]
            kind = answer.WhichOneof("type")
            if kind == "new_session":
                self.session_id = answer.new_session.initialize.session_id or self.session_id
                self.elements = []
            elif kind == "delta" and answer.delta.WhichOneof("type") == "new_element":
                self.elements.append(answer.delta.new_element)
            elif kind == "script_finished" and answer.script_finished == ForwardMsg.FINISHED_SUCCESSFULLY:
                return time.monotonic() - began
        raise TimeoutError(f"{self.page} was not whole after {timeout_s} s")

    def element(self, kind: str, suits: Callable[[Any], bool] = lambda _: True) -> Any:
        """The first element of a kind that suits."""
        found = [getattr(one, kind) for one in self.elements if one.WhichOneof("type") == kind]
        return next(one for one in found if suits(one))

    @property
    def words(self) -> str:
        """What the page shows as text."""
        return "\n".join(one.text.body for one in self.elements if one.WhichOneof("type") == "text")

    def upload(self, name: str, content: bytes) -> float:
        """Upload a file through the first box of the page; how many seconds until the page shows what it says."""
        box = self.element("file_uploader")
        file_id, boundary = str(uuid.uuid4()), uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        request = urllib.request.Request(
            f"{self.url}/_stcore/upload_file/{self.session_id}/{file_id}",
            head.encode() + content + f"\r\n--{boundary}--\r\n".encode(),
            {
                "Content-Type": f"multipart/form-data; boundary={boundary}",
                "Cookie": f"{_XSRF}={self.token}",
                "X-Xsrftoken": self.token,
            },
            method="PUT",
        )
        began = time.monotonic()
        self.opener.open(request).close()
        state = WidgetState(id=box.id)
        info = state.file_uploader_state_value.uploaded_file_info.add()
        info.name, info.size, info.file_id = name, len(content), file_id
        info.file_urls.file_id = file_id
        self.states[box.id] = state
        self.run()
        del self.states[box.id]
        return time.monotonic() - began
