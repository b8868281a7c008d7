"""A real browser for tests: Debian's chromium, driven over a pipe by its own protocol (Chrome DevTools), no library.

What a page asked for and what it complained about are kept: a page of ours asks nobody else for anything.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 20.0
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
AXE = Path(__file__).parent / "browser" / "vendor" / "axe.min.js"


def chromium() -> str | None:
    """The browser's program, where there is one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """A chromium without a window."""

    def __init__(self, program: str, profile: Path) -> None:
        command_out, self._to = os.pipe()
        self._from, answers_in = os.pipe()
        switches = [
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "no-first-run",
            "disable-extensions",
            "hide-scrollbars",
        ]
        switches += ["disable-background-networking", "disable-component-update", "disable-dev-shm-usage", "mute-audio"]
        switches += ["remote-debugging-pipe", f"user-data-dir={profile}", "force-color-profile=srgb"]
        # It reads commands from descriptor 3 and answers on 4; `dup2` in bash, since Popen would close them.
        shell = f'exec "$0" "$@" 3<&{command_out} 4>&{answers_in}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, *(f"--{switch}" for switch in switches)],
            pass_fds=(command_out, answers_in),
            env=os.environ | {"XDG_CONFIG_HOME": str(profile)},  # reports of crashes go there, whatever the profile
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_out)
        os.close(answers_in)
        os.set_blocking(self._from, False)
        self._heard = b""
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.pages: dict[str, Page] = {}

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        self._process.wait(10)

    def call(self, method: str, session: str = "", **params: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        self.listen(lambda: number in self._answers)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def listen(self, until: Any) -> None:
        """Take what the browser says until something holds."""
        end = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < end, "the browser does not answer"
            try:
                heard = os.read(self._from, 1 << 20)
            except BlockingIOError:
                time.sleep(0.002)
                continue
            assert heard, "the browser ended"
            *messages, self._heard = (self._heard + heard).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]] = message
                elif message.get("sessionId") in self.pages:
                    self.pages[message["sessionId"]].hear(message["method"], message["params"])

    @contextmanager
    def page(self, url: str, width: int = 1280, height: int = 800, **media: str) -> Iterator[Page]:
        """Open a page, wait until it is loaded, and close it; media: `prefers_color_scheme="dark"`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        page.media(**media)
        page.go(url)
        try:
            yield page
        finally:
            del self.pages[session]
            self.call("Target.closeTarget", targetId=target)


class Page:
    """One page of the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self._loaded = False
        self.complaints: list[str] = []  # errors and warnings of the console, exceptions, failed requests
        self.requests: list[str] = []  # addresses

    def call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, self._session, **params)

    def hear(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            text = " ".join(str(one.get("value", one.get("description"))) for one in params["args"])
            self._complain(text)
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self._complain(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def _complain(self, text: str) -> None:
        if "willReadFrequently" not in text:  # that is of the test, which looks at a canvas
            self.complaints.append(text)

    def go(self, url: str) -> None:
        self._loaded = False
        self.call("Page.navigate", url=url)
        self._browser.listen(lambda: self._loaded)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def media(self, kind: str = "", **features: str) -> None:
        """Show it as on another medium: `page.media("print")`, `page.media(prefers_color_scheme="dark")`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=kind, features=named)

    def run(self, script: str) -> Any:
        """Return the value of an expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + WAIT_S
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; the page said {self.complaints}"
            time.sleep(0.02)
        return value

    def click(self, x: float, y: float, shift: bool = False) -> None:
        self.drag((x, y), (x, y), shift)

    def drag(self, start: tuple[float, float], end: tuple[float, float], shift: bool = False) -> None:
        def mouse(kind: str, place: tuple[float, float], buttons: int) -> None:
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left" if buttons or kind == "mouseReleased" else "none",
                buttons=buttons,
                clickCount=1,
                modifiers=8 if shift else 0,
            )

        mouse("mouseMoved", start, 0)
        mouse("mousePressed", start, 1)
        if start != end:
            for part in (0.3, 0.7, 1.0):
                mouse("mouseMoved", tuple(a + (b - a) * part for a, b in zip(start, end, strict=True)), 1)  # type: ignore[arg-type]
        mouse("mouseReleased", end, 0)

    def click_on(self, selector: str) -> None:
        """Click the middle of an element."""
        quoted = json.dumps(selector)
        self.wait(f"!!document.querySelector({quoted})")
        box = self.run(
            f"(() => {{ const e = document.querySelector({quoted}); e.scrollIntoView({{block: 'nearest'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.click(*box)

    def press(self, key: str) -> None:
        """Press and release a key, by the name that a KeyboardEvent gives it."""
        text = key if len(key) == 1 else "\r" if key == "Enter" else ""
        code = _KEYS.get(key, ord(key.upper()) if key.isalnum() and len(key) == 1 else 0)
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path | None = None, whole: bool = False, quality: int = 0) -> NDArray[np.uint8]:
        """Return uint8[H, W, 3] RGB of what is seen, or of the whole page; a file gets it, too, as JPEG or PNG."""
        how = {"format": "jpeg", "quality": quality} if quality else {"format": "png"}
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole, **how)["data"])
        if path is not None:
            path.write_bytes(data)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert image is not None
        return np.ascontiguousarray(image[..., ::-1])

    def serious_violations(self) -> list[str]:
        """What axe-core finds in the page that is serious or critical."""
        self.run(AXE.read_text(encoding="utf-8") + "; true")
        found = self.run("axe.run(document, {resultTypes: ['violations']}).then((r) => r.violations)")
        return [
            f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
