"""Builds workflow files in the page's own format from the server's node descriptions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
UPLOADS = ("image_upload", "video_upload", "audio_upload")
COLUMN, GAP, TOP = 400, 60, 60  # pixels on the canvas
# Rows of a node, and what it has besides them, as tall as the page draws them at its tallest:
# Nodes 2.0, which writes the pack's name below the rows.
SLOT, WIDGET, TEXT_BOX, BESIDES = 21, 28, 130, 46
BETWEEN = 56  # from one node to the next; the title, 30, stands in it


@dataclass(frozen=True)
class Out:
    """One output of a node that stands in the graph."""

    node: int
    slot: int
    kind: str


@dataclass
class Graph:
    """Nodes in titled columns, from left to right."""

    info: dict[str, Any]
    """What the server's /object_info says."""
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    _x: int = 0
    _y: int = TOP

    def column(self, title: str, width: int = 1) -> None:
        """Start the next column; it becomes a group with this title."""
        if self.groups:
            self._close()
            self._x += int(self.groups[-1]["bounding"][2]) + GAP
        self._y = TOP
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [self._x - 20, TOP - 70, COLUMN * width, 100],
                "color": "#3f789e",
                "font_size": 24,
                "flags": {},
            }
        )

    def note(self, title: str, text: str, height: int) -> None:
        """A text for the reader."""
        self._place("MarkdownNote", [text], [], [], title, height, color="#432")

    def add(
        self, kind: str, *, title: str | None = None, preview: int = 0, **values: Any
    ) -> tuple[Out, ...]:
        """Add a node; ``values`` are links (``Out``) or widget values, defaults where absent.

        Returns its outputs. Raises ``KeyError`` for a value the node has no input for.
        """
        info = self.info[kind]
        inputs, widgets, height = [], [], BESIDES + preview
        number = len(self.nodes) + 1
        for name, spec in _inputs(info):
            given = values.pop(name, None)
            if isinstance(given, Out) or not _is_widget(spec):
                link = self._link(given, number, len(inputs)) if given is not None else None
                entry: dict[str, Any] = {"name": name, "type": _kind(spec), "link": link}
                if _is_widget(spec):
                    entry["widget"] = {"name": name}
                inputs.append(entry)
            if _is_widget(spec):
                widgets += _widget(spec, None if isinstance(given, Out) else given)
                height += TEXT_BOX if _options(spec).get("multiline") else WIDGET
        if values:
            raise KeyError(f"{kind} has no inputs {sorted(values)}")
        outputs = [
            {"name": name, "type": output, "links": None, "slot_index": slot}
            for slot, (output, name) in enumerate(
                zip(info["output"], info["output_name"], strict=True)
            )
        ]
        height += SLOT * max(len(inputs), len(outputs))
        self._place(kind, widgets, inputs, outputs, title, height)
        return tuple(Out(number, slot, o["type"]) for slot, o in enumerate(outputs))

    def dump(self) -> dict[str, Any]:
        """The whole file, the same from every supported host."""
        self._close()
        for node in self.nodes:
            if _passes_on(self.info.get(node["type"])) and not _read(node):
                node["outputs"] = []
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _close(self) -> None:
        self.groups[-1]["bounding"][3] = self._y - TOP + 80

    def _link(self, origin: Out, target: int, slot: int) -> int:
        number = len(self.links) + 1
        self.links.append([number, origin.node, origin.slot, target, slot, origin.kind])
        output = self.nodes[origin.node - 1]["outputs"][origin.slot]
        output["links"] = [*(output["links"] or []), number]
        return number

    def _place(
        self,
        kind: str,
        widgets: list[Any],
        inputs: list[Any],
        outputs: list[Any],
        title: str | None,
        height: int,
        color: str | None = None,
    ) -> None:
        width = int(self.groups[-1]["bounding"][2]) - 40
        node: dict[str, Any] = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [self._x, self._y],
            "size": [width, height],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": {"Node name for S&R": kind},
            "widgets_values": widgets,
        }
        if title:
            node["title"] = title
        if color:
            node |= {"color": color, "bgcolor": "#653"}
        self.nodes.append(node)
        self._y += height + BETWEEN


def _passes_on(info: dict[str, Any] | None) -> bool:
    """Whether it is a node of ComfyUI's that saves or shows: newer hosts give it an output."""
    return bool(info and info["output_node"] and not info["python_module"].startswith("custom"))


def _read(node: dict[str, Any]) -> bool:
    """Whether a link leaves the node."""
    return any(output["links"] for output in node["outputs"])


def _inputs(info: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (name, spec)
        for part in ("required", "optional")
        for name, spec in (info["input"].get(part) or {}).items()
    ]


def _options(spec: Any) -> dict[str, Any]:
    options: dict[str, Any] = spec[1] if len(spec) > 1 else {}
    return options


def _kind(spec: Any) -> str:
    return "COMBO" if isinstance(spec[0], list) else str(spec[0])


def _is_widget(spec: Any) -> bool:
    return _kind(spec) in WIDGETS and not _options(spec).get("forceInput")


def _widget(spec: Any, given: Any) -> list[Any]:
    options = _options(spec)
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    value = given
    if value is None:
        value = options.get("default")
    if value is None:
        empty: dict[str, Any] = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
        value = choices[0] if choices else empty.get(_kind(spec))
    extra = ["fixed"] if options.get("control_after_generate") else []
    extra += ["image"] if any(options.get(u) for u in UPLOADS) else []
    return [value, *extra]
