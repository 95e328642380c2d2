"""ComfyUI's own validation and executor in this process, as its server calls them for a prompt."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]
Event = tuple[str, dict[str, Any]]


class Recorder:
    """What the executor needs of the server: a place to send its messages."""

    client_id: str | None = "test"
    last_node_id = None

    def __init__(self) -> None:
        self.sent: list[Event] = []

    def send_sync(self, event: Any, values: Any, client_id: Any = None) -> None:
        if isinstance(event, str):  # numbers stand for pictures
            self.sent.append((event, values))


class Executor:
    """One queue's executor: results stay cached from run to run."""

    def __init__(self) -> None:
        execution = importlib.import_module("execution")
        self.recorder = Recorder()
        arguments: dict[str, Any] = {}
        if "cache_args" in inspect.signature(execution.PromptExecutor).parameters:
            arguments["cache_args"] = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        self.host = execution.PromptExecutor(self.recorder, **arguments)
        self.execution = execution

    def validate(self, prompt: Prompt, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Why the server would refuse the prompt: by node, what it answers to POST /prompt.

        ``outputs``: the output nodes that are wanted; None for all of them.
        """
        wanted = None if outputs is None else list(outputs)
        found = asyncio.run(self.execution.validate_prompt("test-prompt", prompt, wanted))
        return dict(found[3])

    def run(self, prompt: Prompt, outputs: Sequence[str]) -> list[Event]:
        """Execute up to ``outputs``; the messages the page would get."""
        self.recorder.sent = []
        self.host.execute(prompt, "test-prompt", {"client_id": "test"}, list(outputs))
        return self.recorder.sent


def executed(events: Sequence[Event]) -> set[str]:
    """Ids of the nodes that ran, and did not come out of the cache."""
    return {v["node"] for e, v in events if e == "executing" and v["node"] is not None}


def shown(events: Sequence[Event], node: str) -> list[dict[str, Any]]:
    """What the page was given to show on a node, in order."""
    return [v["output"] for e, v in events if e == "executed" and v["node"] == node]


def failures(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The errors the page was told."""
    return [v for e, v in events if e == "execution_error"]


class Kept:
    """An output node that takes anything, and keeps what came last for the test to look at."""

    last: Any = None
    RETURN_TYPES = ()
    FUNCTION = "keep"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        typing = importlib.import_module("comfy.comfy_types.node_typing")
        return {"required": {"source": (typing.IO.ANY, {})}}

    def keep(self, source: Any) -> dict[str, Any]:
        Kept.last = source
        return {}


def load_kept() -> None:
    """Make ``Kept`` a node of the host."""
    importlib.import_module("nodes").NODE_CLASS_MAPPINGS["Kept"] = Kept


def load_extra(*names: str) -> None:
    """Load files of ComfyUI's comfy_extras, such as ``preview_any``: nodes beyond nodes.py."""
    nodes = importlib.import_module("nodes")
    for name in names:
        file = Path(os.environ["COMFYUI_PATH"]) / "comfy_extras" / f"nodes_{name}.py"
        assert asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
