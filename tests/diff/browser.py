"""A headless Chromium that opens a page and is told what to do, over the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.sync.client import ClientConnection, connect

__all__ = ["CHROMIUM", "Page", "browser"]

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
_PATIENCE = 8.0
# What was asked to be drawn with the next frame, as a camera that moved, has been: before that, things are elsewhere.
_DRAWN = "new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn))).then(() => true)"
_KEYS = {"Enter": "\r", " ": " "}
_CODES = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Page:
    """One tab. `errors` are exceptions, messages of the console at the level of an error, and refused loads."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number = socket, 0
        self.errors: list[str] = []
        self.loads: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; what is told meanwhile is noted."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=_PATIENCE))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(str([one.get("value") for one in told["args"]]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.loads.append(told["request"]["url"])

    def open(self, path: Path) -> None:
        """Open a file and wait until the page says that it is ready."""
        self.value("delete document.documentElement.dataset.ready")  # of the page that is left
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.documentElement?.dataset.ready")

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript, as plain data."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}; {self.errors}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press a key, as a person would, where the focus is."""
        text = _KEYS.get(key, key if len(key) == 1 else "")
        rest = {"key": key, "windowsVirtualKeyCode": _CODES.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **rest)
        self.call("Input.dispatchKeyEvent", type="keyUp", **rest)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str, *, times: int = 1) -> None:
        """Click with the mouse in the middle of what a selector finds first, where the page stands still."""
        self.value(_DRAWN)
        quoted = json.dumps(selector)
        box = self.value(
            f"(() => {{const b = document.querySelector({quoted})?.getBoundingClientRect();"
            "return b && [b.left + b.width / 2, b.top + b.height / 2]})()"
        )
        assert box, f"nothing is {selector}"
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=count)

    def screenshot(self, path: Path, *, width: int, height: int, dark: bool) -> None:
        """Write what is seen to a PNG file."""
        self.look(width=width, height=height, dark=dark)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def look(self, *, width: int, height: int, dark: bool) -> None:
        """Set the size of the window, and whether the system likes it dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        time.sleep(0.3)


@contextmanager
def browser() -> Iterator[Page]:
    """A browser of its own with one empty tab."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "--window-size=1500,900", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": folder})
        try:
            with connect(_address(Path(folder)), max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait()


def _address(folder: Path) -> str:
    """Where the tab listens; the browser writes its port into its folder."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            port = (folder / "DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            if tabs:
                return str(tabs[0]["webSocketDebuggerUrl"])
        except (OSError, IndexError):
            pass
        time.sleep(0.05)
    raise AssertionError("the browser does not start")
