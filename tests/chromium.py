"""A real headless Chromium, driven over its DevTools protocol: what a page does, asks for and complains about."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

LIMIT_S = 30.0


def find_chromium() -> str | None:
    """The browser's path, None where none is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket
        self._sent = 0
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._session: str | None = None
        self.requests: list[str] = []
        """Every address that was asked for; the page's own is the first."""
        self.complaints: list[str] = []
        """Errors and warnings on the console, uncaught exceptions, what the content security policy refused."""

    async def listen(self) -> None:
        """Take in what the browser says, until it hangs up."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._replies.pop(said["id"]).set_result(said)
            else:
                self._note(said["method"], said["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"a dialog: {params['message']}")

    async def send(self, method: str, **params: Any) -> Any:
        """One command and its result."""
        self._sent += 1
        reply = self._replies[self._sent] = asyncio.get_running_loop().create_future()
        command = {"id": self._sent, "method": method, "params": params}
        await self._socket.send_json(command | ({"sessionId": self._session} if self._session else {}))
        said = await asyncio.wait_for(reply, LIMIT_S)
        assert "error" not in said, (method, said)
        return said["result"]

    async def begin(self) -> None:
        """Open a tab and watch it."""
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.send(f"{domain}.enable")

    async def size(self, width: int, height: int) -> None:
        """Set the window's size, CSS pixels."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def open(self, path: Path) -> None:
        """Load a report and wait until it says that it is ready."""
        await self.send("Page.navigate", url=path.resolve().as_uri())
        await self.until(
            "document.documentElement.dataset.ready === 'yes' || !document.getElementById('trouble').hidden"
        )

    async def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression is true, frame by frame."""
        await self.eval(
            "new Promise((done, fail) => { const end = Date.now() + 20000; const look = () => {"
            f" try {{ if ({expression}) return done(true); }} catch (error) {{ if (Date.now() > end) return fail(error); }}"
            " if (Date.now() > end) return fail(new Error('never true')); setTimeout(look, 20); }; look(); })"
        )

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is in the window, or of the whole page."""
        shot = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """A browser with one tab; `folder` takes its profile."""
    path = find_chromium()
    assert path
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    process = subprocess.Popen(
        [path, *flags, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        address = await asyncio.wait_for(asyncio.to_thread(_address, process), LIMIT_S)
        async with ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            await page.begin()
            yield page
            listening.cancel()
    finally:
        with suppress(ProcessLookupError):
            _kill(process)
        process.wait(10)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr
    for line in process.stderr:
        if "DevTools listening on" in line:
            return line.split()[-1]
    raise AssertionError("the browser ended at once")


def _kill(process: subprocess.Popen[str]) -> None:
    import os

    os.killpg(process.pid, signal.SIGKILL)
