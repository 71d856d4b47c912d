"""``--watch``: the report served on this machine alone while a search runs.

The page is rendered on request, and only if trials have ended since the last request. It is rendered in a thread of the server.
So a search without readers has no extra cost, and an error here is an answer to the browser and does not end the search.
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
    """HTTP server of ``page()`` until closed. The page is rendered again when ``version()`` has changed. Port 0 is any free one.

    Raises ``UserError`` if the port is taken.
    """

    def __init__(self, page: Callable[[], str], version: Callable[[], int], port: int = 0):
        self._page, self._version, self._lock = page, version, threading.Lock()
        self._made: tuple[int, bytes] | None = None
        try:
            self._server = ThreadingHTTPServer((LOOPBACK, port), _handler(self))
        except (OSError, OverflowError) as error:
            raise UserError(f"watch_port: {port} can't be listened on ({error})") from None
        self._server.daemon_threads = True  # an open connection does not keep the process alive
        self.address = f"http://{LOOPBACK}:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="watch", daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def version(self) -> int:
        return self._version()

    def page(self) -> bytes:
        """Return the current page, encoded. Simultaneous requests share one rendering."""
        with self._lock:
            version = self._version()  # read before rendering: trials that end meanwhile appear on the next page
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
            # DNS rebinding: a foreign page can resolve its name to this machine, but the browser still sends that name as host.
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
            """Log nothing, so that the console holds only the search's own lines."""

    return Handler
