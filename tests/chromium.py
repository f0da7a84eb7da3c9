"""A headless Chromium, driven over its DevTools pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

PATIENCE = 30
"""Seconds until something that should take one is given up."""
MODIFIERS = {"Alt": 1, "Control": 2, "Shift": 8}


def find_chromium() -> str | None:
    found = filter(None, map(shutil.which, ("chromium", "google-chrome", "google-chrome-stable")))
    program = next((path for path in found if os.path.basename(os.path.realpath(path)) != "snap"), None)  # a snap has a /tmp of its own
    return program if os.name == "posix" else None


class Chromium:
    def __init__(self, program: str, profile: Path, downloads: Path, size: tuple[int, int] = (1366, 650)):
        (to_read, self.writing), (self.reading, to_write) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        redirected = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self.process = subprocess.Popen(["bash", "-c", redirected, program, *options], pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read), os.close(to_write)
        self.received, self.count, self.session = b"", 0, {}
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def call(self, method: str, **parameters) -> dict:
        self.count += 1
        os.write(self.writing, json.dumps({"id": self.count, "method": method, "params": parameters} | self.session).encode() + b"\0")
        while True:
            while b"\0" not in self.received:
                more = os.read(self.reading, 1 << 16)
                if not more:
                    pytest.fail("the browser went away")
                self.received += more
            message, _, self.received = self.received.partition(b"\0")
            if (answer := json.loads(message)).get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address: str, first: str = "") -> None:
        """In a tab of its own; first: a script that runs before the page's."""
        self.session = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Page.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=first)
        self.call("Page.navigate", url=address)
        self.wait("location.protocol !== 'about:' && document.readyState === 'complete'")

    def ask(self, expression: str):
        """The value of a JavaScript expression, that of a promise when it is kept."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer)
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = PATIENCE):
        until = time.monotonic() + seconds
        while not (answer := self.ask(condition)):
            assert time.monotonic() < until, condition
            time.sleep(0.02)
        return answer

    def press(self, key: str, *modifiers: str) -> None:
        held = sum(MODIFIERS[name] for name in modifiers)
        code = {"key": key, "code": f"Key{key.upper()}", "windowsVirtualKeyCode": ord(key.upper())} if len(key) == 1 else {"key": key, "code": key}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, modifiers=held, **code)

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def mouse(self, kind: str, x: float, y: float, button: str = "left", **more) -> None:
        """kind: Pressed, Released, Moved"""
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button=button, clickCount=0 if kind == "Moved" else 1, **more)

    def click_at(self, x: float, y: float, button: str = "left") -> None:
        for kind in ("Pressed", "Released"):
            self.mouse(kind, x, y, button)

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 8) -> None:
        self.mouse("Moved", *start, button="none")
        self.mouse("Pressed", *start)
        for step in range(1, steps + 1):
            self.mouse("Moved", *(a + (b - a) * step / steps for a, b in zip(start, end)), buttons=1)
        self.mouse("Released", *end)

    def middle(self, selector: str) -> tuple[float, float]:
        """Of the first element, in pixels of the window."""
        return tuple(self.ask(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"))

    def click(self, selector: str) -> None:
        self.click_at(*self.middle(selector))

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.session = {}
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.writing), os.close(self.reading)
