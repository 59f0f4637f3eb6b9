"""A real headless Chromium, driven over its DevTools protocol: what a page does, asks for and complains about."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

LIMIT_S = 60.0
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")

UNTIL = """new Promise((done, fail) => {
  const end = Date.now() + %d;
  const look = () => (%s) ? done(true) : Date.now() > end ? fail(new Error("never true")) : setTimeout(look, 20);
  look();
})"""


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
        """Every address that was asked for; the page's own is the first. `data:` is none."""
        self.complaints: list[str] = []
        """Errors and warnings on the console, refusals by the content security policy, uncaught exceptions, dialogs."""

    async def listen(self) -> None:
        """Take in what the browser says, until it hangs up."""
        async for said in self._socket:
            told = json.loads(said.data)
            if "id" in told:
                self._replies.pop(told["id"]).set_result(told)
            else:
                self._note(told["method"], told["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
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
        told = await asyncio.wait_for(reply, LIMIT_S)
        assert "error" not in told, (method, told)
        return told["result"]

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

    async def open(self, url: str) -> None:
        """Load a report and wait until it is drawn, or says that it cannot be."""
        self.requests, self.complaints = [], []
        await self.send("Page.navigate", url=url)
        await self.until(
            "document.getElementById('trouble') && (document.documentElement.dataset.ready === 'yes'"
            " || !document.getElementById('trouble').hidden)"
        )

    async def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        told = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        await self.eval(UNTIL % (1000 * LIMIT_S / 2, expression))


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """A browser with one tab; `profile` is a folder of its own."""
    path = find_chromium()
    assert path
    command = [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, start_new_session=True
    )
    try:
        address = await asyncio.wait_for(_address(process), LIMIT_S)
        async with ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            await page.begin()
            yield page
            listening.cancel()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _address(process: Process) -> str:
    assert process.stderr
    async for line in process.stderr:
        if b"DevTools listening on" in line:
            return line.split()[-1].decode()
    raise AssertionError("the browser ended at once")
