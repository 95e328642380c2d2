"""ComfyUI's page in a headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-allow-origins=*",
    "--remote-debugging-port=0",
)


NODES_2 = "Comfy.VueNodes.Enabled"
"""Nodes 2.0: the page's setting that draws nodes as elements of the page, not on its canvas."""

SETTINGS = {
    # Else a first visit opens the template browser, or a tour, over the graph.
    "Comfy.TutorialCompleted": True,
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"],
    "Comfy.Minimap.Visible": False,
    "Comfy.Locale": "en",
    NODES_2: False,
}

# Every node as [id, type, left, top, right, bottom] on the canvas, title included, from what is
# drawn: an element of the page where there is one (Nodes 2.0), else the node's own size.
BOXES = """window.app.graph._nodes.map(n => {
    const element = document.querySelector(`[data-node-id="${n.id}"]`);
    const view = window.app.canvas.ds;
    const frame = window.app.canvas.canvas.getBoundingClientRect();
    const title = n.title_mode ? 0 : LiteGraph.NODE_TITLE_HEIGHT;
    if (!element) return [String(n.id), n.type, n.pos[0], n.pos[1] - title,
        n.pos[0] + n.size[0], n.pos[1] + n.size[1]];
    const r = element.getBoundingClientRect();
    return [String(n.id), n.type,
        (r.left - frame.left) / view.scale - view.offset[0],
        (r.top - frame.top) / view.scale - view.offset[1],
        (r.right - frame.left) / view.scale - view.offset[0],
        (r.bottom - frame.top) / view.scale - view.offset[1]];
    })"""


class PageError(Exception):
    """The page did not do what it should; the message holds what it said."""


def find_browser() -> str | None:
    """A Chromium on this machine, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One browser tab. A context manager: the browser ends with it.

    ``settings`` are the page's own; the server keeps them for its later pages.
    """

    def __init__(
        self,
        browser: str,
        url: str,
        width: int = 1920,
        height: int = 1080,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="infinite-id-page-")
        self._process = subprocess.Popen(
            [
                browser,
                *QUIET,
                f"--user-data-dir={self._folder}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._number = 0
        self.problems: list[str] = []
        """Uncaught exceptions of the page."""
        try:
            self._socket = websocket.create_connection(self._tab(), timeout=120)
            self.call("Page.enable")
            self.call("Runtime.enable")
            self.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
            for name, value in {**SETTINGS, **(settings or {})}.items():
                data = json.dumps(value).encode()
                request = urllib.request.Request(f"{url}/settings/{name}", data=data)
                urllib.request.urlopen(request, timeout=30).close()
            self.call("Page.navigate", url=url)
            self.until("window.app && window.app.graph && document.querySelector('#graph-canvas')")
            # Its first graph comes last of all, and would take the place of one opened before it.
            self.until("window.app.graph._nodes.length > 0")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and remove its folder."""
        with contextlib.suppress(AttributeError, OSError, websocket.WebSocketException):
            self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> Any:
        """One DevTools command. Raises ``PageError``."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.problems.append(
                    details.get("exception", {}).get("description", details["text"])
                )
            if message.get("id") == self._number:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']}")
                return message["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def until(self, condition: str, seconds: float = 180) -> None:
        """Wait for a JavaScript condition. Raises ``PageError`` after ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(PageError):
                if self.run(f"Boolean({condition})"):
                    return
            time.sleep(0.2)
        raise PageError(f"not within {seconds:.0f} s: {condition}")

    def screenshot(self, path: Path) -> None:
        """A PNG of the window."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def open_workflow(self, graph: dict[str, Any], name: str | None = None) -> None:
        """Load a workflow as dropping its file on the page does, and fit it to the window."""
        self.run(f"window.app.loadGraphData({json.dumps(graph)}, true, true, {json.dumps(name)})")
        types = json.dumps(sorted(node["type"] for node in graph["nodes"]))
        self.until(
            f"JSON.stringify(window.app.graph._nodes.map(n => n.type).sort()) === "
            f"JSON.stringify({types})"
        )
        self.fit()
        if self.run(f"Boolean(window.app.ui.settings.getSettingValue('{NODES_2}'))"):
            drawn = "document.querySelector(`[data-node-id='${n.id}']`)"
            self.until(f"window.app.graph._nodes.every(n => {drawn})")

    def fit(self, margin: int = 70, bar: int = 100) -> None:
        """Show the whole graph, clear of the page's side bar and top bar."""
        self.run(
            f"""(() => {{
            const c = window.app.canvas, ns = window.app.graph._nodes;
            const gs = window.app.graph._groups.map(g => [g._pos[0], g._pos[1],
                g._pos[0] + g._size[0], g._pos[1] + g._size[1]]);
            const bs = ns.map(n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0],
                n.pos[1] + n.size[1]]).concat(gs);
            const x0 = Math.min(...bs.map(b => b[0])), y0 = Math.min(...bs.map(b => b[1]));
            const x1 = Math.max(...bs.map(b => b[2])), y1 = Math.max(...bs.map(b => b[3]));
            const w = c.canvas.clientWidth - {margin} - 20, h = c.canvas.clientHeight - {bar} - 20;
            const s = Math.min(w / (x1 - x0), h / (y1 - y0), 1.0);
            c.ds.scale = s;
            c.ds.offset[0] = {margin} / s - x0;
            c.ds.offset[1] = {bar} / s - y0;
            c.setDirty(true, true);
            }})()"""
        )
        time.sleep(1.0)

    def trouble(self) -> dict[str, list[str]]:
        """Nodes the page does not know, nodes it marks red, and what its dialogs say."""
        return self.run(
            """({
            missing: window.app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]
                && !['Note', 'MarkdownNote'].includes(n.type)).map(n => n.type),
            red: window.app.graph._nodes.filter(n => n.has_errors).map(n => n.type),
            dialogs: [...document.querySelectorAll('[role=dialog], .comfy-modal')]
                .filter(d => d.checkVisibility())
                .map(d => d.innerText.slice(0, 300)),
            })"""
        )

    def overlaps(self) -> list[str]:
        """Pairs of nodes of which one is drawn over the other."""
        boxes = self.run(BOXES)
        return [
            f"{a[1]} {a[0]} and {b[1]} {b[0]}"
            for number, a in enumerate(boxes)
            for b in boxes[:number]
            if min(a[4], b[4]) > max(a[2], b[2]) and min(a[5], b[5]) > max(a[3], b[3])
        ]

    def outside(self) -> list[str]:
        """Nodes that are not drawn wholly inside one of the graph's groups."""
        groups = self.run(
            """window.app.graph._groups.map(g => [g._pos[0], g._pos[1],
            g._pos[0] + g._size[0], g._pos[1] + g._size[1]])"""
        )
        return [
            f"{kind} {number}"
            for number, kind, x0, y0, x1, y1 in self.run(BOXES)
            if not any(x0 >= g[0] and y0 >= g[1] and x1 <= g[2] and y1 <= g[3] for g in groups)
        ]

    def press(self, key: str) -> None:
        """Press a key that writes nothing, such as Escape."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def queue(self, seconds: float = 300) -> None:
        """Press Run and wait for the end."""
        self.run("window.app.queuePrompt(0, 1)")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            queue = self.run("fetch('/queue').then(answer => answer.json())")
            if not queue["queue_running"] and not queue["queue_pending"]:
                time.sleep(1.0)  # for the last pictures to arrive
                return
            time.sleep(0.3)
        raise PageError(f"not done within {seconds:.0f} s")

    def _tab(self) -> str:
        """The DevTools address of the browser's tab."""
        file = Path(self._folder) / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not file.is_file() or not file.read_text(encoding="utf-8").strip():
            if time.monotonic() > end or self._process.poll() is not None:
                raise PageError("the browser did not start")
            time.sleep(0.1)
        port = file.read_text(encoding="utf-8").split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            tabs = json.load(answer)
        return str(next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"))
