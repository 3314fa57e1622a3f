"""Chromium without a screen, driven over the W3C WebDriver protocol: a dozen HTTP requests, so no library for it."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
from jobs import free_ports

from ops.pictures import save_small
from ops.tools import chromium

PATIENCE_S = 60.0
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The protocol's key of an element's id."""
ENTER = "\ue007"
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--disable-sync"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    "--window-size=1400,1000",
]
"""Root may not have a sandbox; /dev/shm belongs to Ray; nothing but the page is to be fetched."""


@dataclass(frozen=True)
class Entry:
    """A line of the browser's console."""

    level: str
    """SEVERE: an exception of the page, or a request that failed."""
    message: str


class Browser:
    """A new one, of nobody: without cookies, with its profile in `folder`."""

    def __init__(self, folder: Path):
        program, driver = chromium()
        port = free_ports(1)
        self.console: list[Entry] = []
        """All that was said so far."""
        self._driver = subprocess.Popen(
            [driver, f"--port={port}", f"--log-path={folder / 'chromedriver.txt'}"],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(folder)},
            start_new_session=True,
        )
        try:
            self._url = f"http://127.0.0.1:{port}"
            self._wait_for_driver()
            options = {"binary": str(program), "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = self._ask("POST", "session", capabilities={"alwaysMatch": wanted})["sessionId"]
        except BaseException:
            self._end()
            raise
        self._url += f"/session/{session}"

    def _wait_for_driver(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                if self._ask("GET", "status")["ready"]:
                    return
            except requests.ConnectionError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        json = body if method == "POST" else None
        url = f"{self._url}/{path}".rstrip("/")
        answer = requests.request(method, url, json=json, timeout=2 * PATIENCE_S).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{method} {path}: {answer['error']}: {answer['message']}")
        return answer

    def open(self, url: str) -> None:
        self._ask("POST", "url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        """What a function with this body returns in the page."""
        return self._ask("POST", "execute/sync", script=script, args=list(args))

    def text(self) -> str:
        """All that a person could read on the page, as laid out, also what is scrolled out of sight."""
        return self.run("return document.body.innerText")

    def wait_for(self, text: str) -> str:
        """-> the page's text, once `text` is in it."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in (found := self.text()):
            assert time.monotonic() < deadline, f"no {text!r} on the page:\n{found}\n{self.listen()}"
            time.sleep(0.2)
        return found

    def reference(self, xpath: str) -> dict[str, str]:
        """The first such element, as `run` passes it to a script."""
        return {ELEMENT: self.find(xpath)}

    def find(self, xpath: str) -> str:
        """The first such element's id, once there is one."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._ask("POST", "element", using="xpath", value=xpath)[ELEMENT]
            except RuntimeError:
                assert time.monotonic() < deadline, f"no {xpath} on the page:\n{self.text()}"
            time.sleep(0.2)

    def click(self, xpath: str) -> None:
        self._ask("POST", f"element/{self.find(xpath)}/click")

    def type(self, xpath: str, text: str) -> None:
        self._ask("POST", f"element/{self.find(xpath)}/value", text=text)

    def listen(self) -> list[Entry]:
        """The console, up to now."""
        new = self._ask("POST", "se/log", type="browser")
        self.console += [Entry(entry["level"], entry["message"]) for entry in new]
        return self.console

    def picture(self, path: Path) -> None:
        """What the window shows."""
        save_small(base64.b64decode(self._ask("GET", "screenshot")), path)

    def resize(self, width: int, height: int) -> None:
        self._ask("POST", "window/rect", width=width, height=height)

    def close(self) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._end()

    def _end(self) -> None:
        for process in [*psutil.Process(self._driver.pid).children(recursive=True), self._driver]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._driver.wait(timeout=30)
