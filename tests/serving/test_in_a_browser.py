"""The pages in a real Chromium: the chat with several adapters side by side, from the keyboard, on a narrow screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")]
WIDTH = 360


class Browser:
    """A page in Chromium, driven through its debugging pipe: messages of JSON that end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def pass_pipes() -> None:  # the browser reads from 3 and writes to 4
            os.dup2(to_read, 13)
            os.dup2(to_write, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        words = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(
            words, preexec_fn=pass_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._left, self._number, self._session = b"", 0, {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.send("Emulation.setDeviceMetricsOverride", width=WIDTH, height=800, deviceScaleFactor=1, mobile=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                self._left += os.read(self._read, 1 << 16)
            text, _, self._left = self._left.partition(b"\0")
            found = json.loads(text)
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def value(self, expression: str) -> Any:
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        end = time.monotonic() + 30
        while not (found := self.value(expression)):
            assert time.monotonic() < end, expression
            time.sleep(0.05)
        return found

    def press(self, key: str) -> None:
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text="\r" if key == "Enter" else "",
                  windowsVirtualKeyCode={"Enter": 13, "Tab": 9}[key])  # fmt: skip
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    found = Browser(tmp_path / "profile")
    yield found
    found.process.terminate()
    found.process.wait(20)


def test_one_question_is_answered_by_several_adapters_side_by_side(browser: Browser, loaded: Any) -> None:
    from graft.serving.app import make_app

    server = Running(make_app(loaded, rows=8))
    browser.send("Page.navigate", url=f"{server.url}/chat")
    browser.until("document.readyState === 'complete' && document.querySelectorAll('#ask [name=model]').length === 4")
    assert browser.value("document.documentElement.scrollWidth") <= WIDTH
    browser.press("Tab")
    assert browser.value("document.activeElement.className") == "skip"
    browser.value(
        "document.querySelector('[name=tokens]').value = 12; document.querySelector('[name=question]').focus()"
    )
    for _ in range(2):  # the second question is asked behind the first
        browser.send("Input.insertText", text="What is 40 plus 2?")
        before = browser.value("document.querySelectorAll('.answer').length")
        browser.press("Enter")
        browser.until(f"document.querySelectorAll('.answer').length === {before} + 2")
        browser.until("[...document.querySelectorAll('.answer')].every((each) => each.textContent.length > 3)")
    texts = browser.value("[...document.querySelectorAll('#answers section')].map((each) => each.innerText)")
    assert [text.split("\n")[0] for text in texts] == ["base", "lead"] and all(
        text.count("What is 40") == 2 for text in texts
    )
    browser.until("document.querySelector('[data-text]').textContent.includes('tokens so far')")
    server.stop()
