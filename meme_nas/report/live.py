"""``--watch``: the report served on this machine alone while a search runs.

The page is made when a browser asks for it and trials have ended since, in a thread of the server: a search that nobody looks at
pays nothing, and whatever fails here is the browser's answer, not the search's end.
"""

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from plotly.offline import get_plotlyjs

from meme.errors import UserError

LOOPBACK = "127.0.0.1"
_OURS = ("127.0.0.1", "localhost")


class Watch(AbstractContextManager["Watch", None]):
    """Serves ``page()`` until closed, made anew whenever ``version()`` has changed. Port 0 is any free one.

    ``UserError`` where the port is taken.
    """

    def __init__(self, page: Callable[[], str], version: Callable[[], int], port: int = 0):
        self._page, self._version, self._lock = page, version, threading.Lock()
        self._made: tuple[int, bytes] | None = None
        try:
            self._server = ThreadingHTTPServer((LOOPBACK, port), _handler(self))
        except (OSError, OverflowError) as error:
            raise UserError(f"watch_port: {port} can't be listened on ({error})") from None
        self._server.daemon_threads = True  # a browser that holds a connection does not hold the search
        self.address = f"http://{LOOPBACK}:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="watch", daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def version(self) -> int:
        return self._version()

    def page(self) -> bytes:
        """The page as of now; browsers that ask at once share one."""
        with self._lock:
            version = self._version()  # before the page: what ends while it is made belongs to the next one
            if self._made is None or self._made[0] != version:
                self._made = version, self._page().encode()
            return self._made[1]


def _handler(watch: Watch) -> type[BaseHTTPRequestHandler]:
    contents: dict[str, tuple[str, Callable[[], bytes]]] = {
        "/": ("text/html; charset=utf-8", watch.page),
        "/version": ("application/json", lambda: json.dumps(watch.version).encode()),
        "/plotly.js": ("text/javascript; charset=utf-8", lambda: get_plotlyjs().encode()),
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # seconds that a silent connection is kept

        def do_GET(self) -> None:
            # A page from elsewhere may point a name of its own at this machine; it can't change what its browser says here.
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in _OURS:
                self.send_error(HTTPStatus.FORBIDDEN)
            elif (path := urlsplit(self.path).path) not in contents:
                self.send_error(HTTPStatus.NOT_FOUND)
            else:
                self._answer(*contents[path], lasting=path == "/plotly.js")

        def _answer(self, kind: str, content: Callable[[], bytes], lasting: bool) -> None:
            try:
                body = content()
            except Exception as error:
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=f"{type(error).__name__}: {error}")
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "max-age=86400" if lasting else "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *message: object) -> None:
            """Nothing: the search's own lines are what is read there."""

    return Handler
