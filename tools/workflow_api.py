"""From ComfyUI's workflow file (the page's graph) to the prompt its HTTP interface takes.

The page does this conversion in the browser; there is no endpoint for it. What decides is the
server's /object_info: the order of a node's inputs, and which of them are widgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
_NOT_NODES = frozenset({"Note", "MarkdownNote", "Reroute", "PrimitiveNode"})
_MUTED, _BYPASSED = 2, 4
_SEEDS = frozenset({"seed", "noise_seed"})
_UPLOADS = ("image_upload", "video_upload", "audio_upload", "animated_image_upload")


class WorkflowError(ValueError):
    """The graph cannot be made into a prompt; the message names the node and what is wrong."""


class UnknownNode(WorkflowError):
    """The server has no node of that type: a pack is missing, or failed to load."""


class UnsupportedGraph(WorkflowError):
    """The graph uses something that only the page can resolve."""


@dataclass(frozen=True, kw_only=True)
class _Link:
    origin: int | str
    slot: int
    type: Any


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A constant that reaches an input through a link from a PrimitiveNode."""

    value: Any


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """One place in widgets_values; `name` is None for a value that only the page uses."""

    name: str | None
    default: Any = None
    optional: bool = False  # some page versions write it, some do not


def to_api(graph: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Convert a workflow graph to an API prompt.

    Args:
        graph: a workflow file: `nodes`, `links` (rows or objects), ...
        object_info: the server's /object_info.

    Returns:
        {node id: {"class_type", "inputs", "_meta": {"title"}}}, nodes in the file's order. Muted
        nodes are left out, bypassed ones replaced by what they pass on, reroutes followed, notes
        dropped.

    Raises:
        UnknownNode: a type that object_info lacks.
        UnsupportedGraph: subgraphs, or not a workflow graph at all.
        WorkflowError: a link that leads nowhere it should.
    """
    return _Converter(graph, object_info).convert()


class _Converter:
    def __init__(self, graph: dict[str, Any], object_info: dict[str, Any]) -> None:
        if not isinstance(graph.get("nodes"), list) or not isinstance(graph.get("links"), list):
            raise UnsupportedGraph(
                "Expected a workflow graph with lists 'nodes' and 'links', "
                f"found the keys {sorted(graph)[:8]}."
            )
        self.object_info = object_info
        self.nodes = {node["id"]: node for node in graph["nodes"]}
        self.links = dict(_read_link(link) for link in graph["links"])
        subgraphs = (graph.get("definitions") or {}).get("subgraphs") or []
        self.subgraphs = {subgraph["id"] for subgraph in subgraphs}

    def convert(self) -> dict[str, Any]:
        prompt = {}
        for node in self.nodes.values():
            if node["type"] in _NOT_NODES or node.get("mode", 0) in (_MUTED, _BYPASSED):
                continue
            prompt[str(node["id"])] = self._convert_node(node)
        return prompt

    def _convert_node(self, node: dict[str, Any]) -> dict[str, Any]:
        info = self._info(node)
        inputs = self._widget_values(node, info)
        for socket in node.get("inputs") or []:
            source = self._resolve(socket.get("link"))
            if isinstance(source, _Value):
                inputs[socket["name"]] = source.value
            elif source is not None:
                inputs[socket["name"]] = [str(source.origin), source.slot]
        title = node.get("title") or info.get("display_name") or node["type"]
        return {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}

    def _info(self, node: dict[str, Any]) -> dict[str, Any]:
        kind = node["type"]
        if kind in self.subgraphs:
            raise UnsupportedGraph(
                f"Node {node['id']} is a subgraph ('{node.get('title', kind)}'): unpack it in "
                "ComfyUI's page and save the workflow again."
            )
        if kind not in self.object_info:
            raise UnknownNode(
                f"Node {node['id']} has the type '{kind}', which this ComfyUI does not know: "
                "its pack is missing or failed to load (see the server's log)."
            )
        return dict(self.object_info[kind])

    def _widget_values(self, node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        """Values of the node's widgets by name, as stored in the file."""
        slots = _widget_slots(info)
        stored = node.get("widgets_values") or []
        if isinstance(stored, dict):  # some nodes save by name
            values = {s.name: stored.get(s.name, s.default) for s in slots if s.name is not None}
        else:
            if len(stored) < len(slots):
                slots = [slot for slot in slots if not slot.optional]
            values = {
                slot.name: stored[i] if i < len(stored) else slot.default
                for i, slot in enumerate(slots)
                if slot.name is not None
            }
        # A bare list means a link in a prompt, so the page wraps lists that are values.
        return {k: {"__value__": v} if isinstance(v, list) else v for k, v in values.items()}

    def _resolve(self, link_id: int | None) -> _Link | _Value | None:
        """Follow a link back to the node that computes the value; None where nothing does."""
        seen = set()
        while link_id is not None:
            if link_id in seen:
                raise WorkflowError(f"Link {link_id} runs in a circle of reroutes or bypasses.")
            seen.add(link_id)
            if link_id not in self.links:
                raise WorkflowError(
                    f"Link {link_id} is used by a node but not in the list 'links'."
                )
            link = self.links[link_id]
            origin = self.nodes.get(link.origin)
            if origin is None:
                raise WorkflowError(f"Link {link_id} comes from node {link.origin}: no such node.")
            mode = origin.get("mode", 0)
            if mode == _MUTED:
                return None
            if origin["type"] == "PrimitiveNode":
                return _Value(value=(origin.get("widgets_values") or [None])[0])
            if origin["type"] == "Reroute":
                link_id = (origin.get("inputs") or [{}])[0].get("link")
            elif mode == _BYPASSED:
                link_id = _bypass(origin, link)
            else:
                return link
        return None


def _read_link(link: Any) -> tuple[int, _Link]:
    """A link as a row [id, origin, slot, target, slot, type], or as an object (newer files)."""
    if isinstance(link, dict):
        return link["id"], _Link(
            origin=link["origin_id"], slot=link["origin_slot"], type=link.get("type")
        )
    return link[0], _Link(origin=link[1], slot=link[2], type=link[5] if len(link) > 5 else None)


def _bypass(node: dict[str, Any], link: _Link) -> int | None:
    """The link that a bypassed node passes on: the input opposite, else the first of its type."""
    inputs = node.get("inputs") or []
    wanted = node["outputs"][link.slot].get("type", link.type)
    for candidate in [*inputs[link.slot : link.slot + 1], *inputs]:
        if candidate.get("type") in (wanted, "*") or wanted == "*":
            found: int | None = candidate.get("link")
            return found
    return None


def _widget_slots(info: dict[str, Any]) -> list[_Slot]:
    """The places of widgets_values, in the order in which the page makes the widgets."""
    slots: list[_Slot] = []
    for name, spec in _ordered_inputs(info):
        kind, options = spec[0], (spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {})
        combo = isinstance(kind, list) or kind == "COMBO"
        if not (combo or kind in _WIDGET_TYPES) or options.get("forceInput"):
            continue
        slots.append(_Slot(name=name, default=_default(kind, options)))
        control = options.get("control_after_generate", kind == "INT" and name in _SEEDS)
        if control and (combo or kind == "INT"):
            # Beside it the page keeps "fixed", "randomize", ...; for a combo also a filter.
            slots += [_Slot(name=None)] * (2 if combo else 1)
        if any(options.get(upload) for upload in _UPLOADS):
            slots.append(_Slot(name=None, optional=True))  # the upload button
    return slots


def _ordered_inputs(info: dict[str, Any]) -> list[tuple[str, Any]]:
    order = info.get("input_order") or {}
    found = []
    for section in ("required", "optional"):
        specs = info.get("input", {}).get(section) or {}
        found += [(name, specs[name]) for name in order.get(section, specs) if name in specs]
    return found


def _default(kind: Any, options: dict[str, Any]) -> Any:
    """What the page shows before anybody has chosen."""
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices:
        return choices[0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(str(kind))
