"""Chromium for the tests of pages, driven by plain HTTP (W3C WebDriver)."""

import json
import re
import time
import urllib.request

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Browser:
    """Chromium behind chromedriver, by plain HTTP (W3C WebDriver)."""

    def __init__(self, url: str, profile):
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": [*FLAGS, f"--user-data-dir={profile}"]},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self.url = f"{url}/session"
        session = self.call("", {"capabilities": {"alwaysMatch": capabilities}})
        self.url += "/" + session["sessionId"]
        # a window that is not in front has no focus, and says nothing when an element gets it
        self.cdp("Emulation.setFocusEmulationEnabled", {"enabled": True})

    def call(self, path: str, body: dict | None, method: str = "POST"):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["value"]

    def open(self, path, ready: str = "document.querySelector('article h2')") -> None:
        """Open a page afresh, without the last one's logs, and wait until something is true."""
        self.call("/url", {"url": "about:blank"})
        for kind in ("browser", "performance"):
            self.log(kind)  # reading a log empties it
        self.call("/url", {"url": path.as_uri()})
        self.wait(ready)

    def js(self, expression: str):
        return self.call("/execute/sync", {"script": f"return {expression}", "args": []})

    def wait(self, expression: str) -> None:
        deadline = time.monotonic() + 300
        while not self.js(f"!!({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def set(self, name: str, value) -> None:
        """Change a filter as a reader would, and wait until the cards are filled."""
        attribute = "checked" if isinstance(value, bool) else "value"
        filter_ = f"document.forms[0][{json.dumps(name)}]"
        self.js(f"{filter_}.{attribute} = {json.dumps(value)}")
        self.js(f"{filter_}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        self.wait("[...document.querySelectorAll('article')].every(a => a.children.length)")

    def set_plain(self, name: str, value: str) -> None:
        """Change a form's element as a reader would."""
        element = f"document.forms[0][{json.dumps(name)}]"
        self.js(f"{element}.value = {json.dumps(value)}")
        self.js(f"{element}.dispatchEvent(new Event('input', {{bubbles: true}}))")

    def cdp(self, command: str, parameters: dict):
        """Give Chromium a command of its own protocol."""
        return self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def press(self, key: str) -> None:
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self.call("/actions", {"actions": [keyboard]})

    def log(self, kind: str) -> list[dict]:
        return self.call("/se/log", {"type": kind})

    def cards(self) -> list[str]:
        titles = "[...document.querySelectorAll('article h2')].map(h => h.firstChild.data.trim())"
        return self.js(titles)

    def opened(self) -> list[bool]:
        return self.js("[...document.querySelectorAll('.sample')].map(s => s.open)")

    def count(self) -> str:
        return self.js("document.querySelector('output').value")


def read_port(lines) -> str:
    """Read chromedriver's output up to the port that it listens on."""
    for line in lines:
        match = re.search(r"successfully on port (\d+)", line)
        if match:
            return match[1]
    raise AssertionError("chromedriver ended before it listened on a port")
