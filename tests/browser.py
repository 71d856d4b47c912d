"""A headless Chromium over its debugging protocol: what a person does to a page, and what they would see."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
STARTS_IN, ANSWERS_IN, COMES_IN = 120.0, 120.0, 120.0  # seconds at most, on a machine with other work


@contextmanager
def browser(profile: Path) -> Iterator["Browser"]:
    """Skips the test where no Chromium is installed."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page is not rendered")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *_QUIET.split()]
    command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = Browser(_port(profile / "DevToolsActivePort"))
        try:
            yield found
        finally:
            found.close()
    finally:
        process.terminate()
        process.wait(timeout=20)


def _port(file: Path) -> int:
    deadline = time.monotonic() + STARTS_IN
    while not (file.is_file() and (lines := file.read_text().splitlines())):
        if time.monotonic() > deadline:
            raise TimeoutError("chromium did not start")
        time.sleep(0.05)
    return int(lines[0])


class Browser:
    """One tab. ``complaints`` are exceptions, and whatever was logged as an error or a warning."""

    def __init__(self, port: int):
        self.complaints: list[str] = []
        self._loop, self._number = asyncio.new_event_loop(), 0
        self._events: list[dict] = []
        self._loop.run_until_complete(self._connect(port))
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    async def _connect(self, port: int) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(each for each in await answer.json() if each["type"] == "page")
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    def close(self) -> None:
        async def close() -> None:
            await self._socket.close()
            await self._session.close()

        self._loop.run_until_complete(close())
        self._loop.close()

    def call(self, method: str, **parameters: Any) -> dict:
        self._number += 1
        return self._loop.run_until_complete(asyncio.wait_for(self._call(self._number, method, parameters), ANSWERS_IN))

    async def _call(self, number: int, method: str, parameters: dict) -> dict:
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = await self._socket.receive_json()
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]

    def _note(self, message: dict) -> None:
        kind, details = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(details["exceptionDetails"]))
        elif kind == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.complaints.append(details["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(details["args"]))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = COMES_IN) -> None:
        deadline = time.monotonic() + seconds
        while not self.ask(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"it never came to: {expression}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """A key by its name, ``Enter``, ``Tab``, ``Escape``, ``ArrowRight``."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}[key]
        details = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **details, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **details)

    def click(self, x: float, y: float) -> None:
        """At a place of the viewport."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def show_as(self, *, width: int, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
