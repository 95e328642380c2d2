"""Speaking to a ComfyUI server: prompts, events and files over HTTP and websocket."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import websocket

from .workflow_api import to_api

Event = tuple[str, dict[str, Any]]


class ComfyLiveError(Exception):
    """Base of everything that can go wrong with the live server."""


class ServerDied(ComfyLiveError):
    """The server did not start, or ended while it was needed; carries the end of its log."""


class PromptRejected(ComfyLiveError):
    """The server refused the prompt before running it; carries the nodes' validation errors."""


class NodeFailed(ComfyLiveError):
    """A node raised while the prompt ran.

    Attributes: `node_id`, `node_type`, `exception_type`, `exception_message`, `traceback` (text).
    """

    def __init__(self, details: dict[str, Any]) -> None:
        self.node_id = str(details.get("node_id"))
        self.node_type = str(details.get("node_type"))
        # Without its module, whose name holds the temporary folder the pack was loaded from.
        self.exception_type = str(details.get("exception_type")).rpartition(".")[2]
        self.exception_message = str(details.get("exception_message")).strip()
        self.traceback = "".join(details.get("traceback") or [])
        super().__init__(
            f"Node {self.node_id} ({self.node_type}) failed: "
            f"{self.exception_type}: {self.exception_message}"
        )


class PromptInterrupted(ComfyLiveError):
    """The prompt was interrupted before it ended."""


class PromptTimeout(ComfyLiveError):
    """The prompt did not end in the time given."""


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """A file the server can hand out: what SaveImage and PreviewImage report."""

    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one prompt gave. `outputs` maps node id to that node's UI outputs, as in /history."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]

    def images(self, node_id: str | None = None, *, type: str | None = "output") -> list[ImageRef]:
        """Pictures in node order; of one node, or of one type ('output', 'temp', None for all)."""
        found = []
        for key, output in self.outputs.items():
            if node_id is not None and key != str(node_id):
                continue
            for image in output.get("images", []):
                if type is None or image.get("type") == type:
                    found.append(
                        ImageRef(**{k: image[k] for k in ("filename", "subfolder", "type")})
                    )
        return found


class ComfyClient:
    """One client of the server on ``port`` of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.client_id = uuid.uuid4().hex
        self._socket: websocket.WebSocket | None = None
        self._http = requests.Session()
        self._http.trust_env = False  # a proxy of the user's must not see 127.0.0.1
        self._object_info: dict[str, Any] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End the connections. Safe to call twice."""
        if self._socket is not None:
            with contextlib.suppress(Exception):
                self._socket.close()
            self._socket = None
        self._http.close()

    def check_alive(self, when: str) -> None:
        """Raises `ServerDied` where the server is known to have ended; `when` tells at what."""

    # -- HTTP ------------------------------------------------------------------------------------

    def get(self, path: str, **params: Any) -> Any:
        """GET a JSON endpoint, e.g. `get("/object_info")`."""
        response = self._http.get(self.url + path, params=params, timeout=120)
        response.raise_for_status()
        return response.json()

    def object_info(self) -> dict[str, Any]:
        """/object_info: every node's inputs and outputs. Read once; file lists are of that time."""
        if self._object_info is None:
            self._object_info = dict(self.get("/object_info"))
        return self._object_info

    def refresh(self) -> None:
        """Forget /object_info, so that new files under models/ and input/ are seen."""
        self._object_info = None

    def upload(self, image: Path | bytes, name: str | None = None) -> str:
        """Put a picture into the input folder; returns the name LoadImage takes."""
        data = image if isinstance(image, bytes) else image.read_bytes()
        if name is None:
            name = "upload.png" if isinstance(image, bytes) else image.name
        response = self._http.post(
            f"{self.url}/upload/image",
            files={"image": (name, data)},
            data={"overwrite": "true"},
            timeout=120,
        )
        response.raise_for_status()
        stored = response.json()
        return "/".join(part for part in (stored["subfolder"], stored["name"]) if part)

    def fetch(self, image: ImageRef) -> bytes:
        """The bytes of a picture that a prompt made, over /view."""
        params = {"filename": image.filename, "subfolder": image.subfolder, "type": image.type}
        response = self._http.get(f"{self.url}/view", params=params, timeout=120)
        response.raise_for_status()
        return response.content

    def interrupt(self) -> None:
        """Stop the prompt that runs now."""
        self._http.post(f"{self.url}/interrupt", timeout=30).raise_for_status()

    def to_api(self, graph: dict[str, Any]) -> dict[str, Any]:
        """A workflow file's graph as the prompt this server takes (see `workflow_api.to_api`)."""
        return to_api(graph, self.object_info())

    # -- prompts ---------------------------------------------------------------------------------

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format prompt; returns its id.

        Raises:
            PromptRejected: the server's validation refused it.
        """
        self._connect()
        response = self._http.post(
            f"{self.url}/prompt", json={"prompt": prompt, "client_id": self.client_id}, timeout=120
        )
        body = response.json()
        if response.status_code != 200 or body.get("node_errors"):
            raise PromptRejected(_rejection(body))
        return str(body["prompt_id"])

    def events(self, prompt_id: str, *, timeout: float = 600.0) -> Iterator[Event]:
        """The server's messages about one prompt, as (type, data), until it has ended.

        Raises:
            ServerDied, PromptTimeout.
        """
        connection = self._connect()
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                self.check_alive("while a prompt ran")
                if self._history(prompt_id) is not None:  # its last message was lost
                    return
                continue
            except (websocket.WebSocketException, OSError):
                self._socket = None
                time.sleep(0.2)  # let a dying process die, so that the error names it
                self.check_alive("while a prompt ran")
                connection = self._connect()
                continue
            if not isinstance(message, str) or not message:  # binary: a preview
                continue
            event = json.loads(message)
            data = event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            yield str(event["type"]), data
            # The worker's own closing message: by now the history is written.
            if event["type"] == "executing" and data.get("node") is None:
                return
        raise PromptTimeout(f"Prompt {prompt_id} did not end in {timeout:.0f} s.")

    def wait(
        self,
        prompt_id: str,
        *,
        timeout: float = 600.0,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> Result:
        """Follow a prompt to its end.

        Raises:
            NodeFailed, PromptInterrupted, ServerDied, PromptTimeout.
        """
        for kind, data in self.events(prompt_id, timeout=timeout):
            if on_event is not None:
                on_event(kind, data)
        history = self._history(prompt_id)
        if history is None:
            raise ServerDied(f"The server ended prompt {prompt_id} but has no record of it.")
        for kind, data in history["status"]["messages"]:
            if kind == "execution_error":
                raise NodeFailed(data)
            if kind == "execution_interrupted":
                raise PromptInterrupted(f"Interrupted in node {data['node_id']}.")
        return Result(prompt_id=prompt_id, outputs=history["outputs"])

    def run(
        self,
        prompt: dict[str, Any],
        *,
        timeout: float = 600.0,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> Result:
        """Queue a prompt (API format) and follow it to its end: `queue`, then `wait`."""
        return self.wait(self.queue(prompt), timeout=timeout, on_event=on_event)

    def _history(self, prompt_id: str) -> dict[str, Any] | None:
        entry = self.get(f"/history/{prompt_id}").get(prompt_id)
        return dict(entry) if entry else None

    def _connect(self) -> websocket.WebSocket:
        """The websocket, opened before the first prompt so that no message of it is missed."""
        if self._socket is None:
            self._socket = websocket.create_connection(
                f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}",
                timeout=2,
                http_no_proxy=["127.0.0.1"],
            )
        return self._socket


def _rejection(body: dict[str, Any]) -> str:
    """The server's refusal as text: the first line, then a line per node and error."""
    error = body.get("error") or {}
    lines = [f"ComfyUI refused the prompt: {error.get('message', 'no reason given')}"]
    if error.get("details"):
        lines.append(f"  {error['details']}")
    for node_id, node in (body.get("node_errors") or {}).items():
        for problem in node.get("errors", []):
            lines.append(
                f"  node {node_id} ({node.get('class_type')}): "
                f"{problem.get('message')}: {problem.get('details')}"
            )
    return "\n".join(lines)
