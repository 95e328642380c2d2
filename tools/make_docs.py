"""Writes what is made of other files: docs/nodes.md and locales/en/nodeDefs.json.

    python -m tools.make_docs          # needs ComfyUI, for its node descriptions

docs/nodes.md strings the help pages together; the English labels are the nodes' own texts, and
the pattern for translations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .node_ids import NODE_IDS

ROOT = Path(__file__).resolve().parents[1]
HELP = ROOT / "web" / "docs"
REFERENCE = ROOT / "docs" / "nodes.md"
LOCALES = ROOT / "locales"

CHAPTERS = {
    "The short way": ("InfiniteIDLoader", "InfiniteIDPerson"),
    "Loading models": (
        "InfiniteIDFaceModelLoader",
        "InfiniteIDOpenClipLoader",
        "InfiniteIDAdapterLoader",
        "InfiniteIDMicroModel",
    ),
    "Who": (
        "InfiniteIDMicroPortrait",
        "InfiniteIDAlignFace",
        "InfiniteIDEncode",
        "InfiniteIDMix",
        "InfiniteIDSaveIdentity",
        "InfiniteIDLoadIdentity",
    ),
    "Painting": ("InfiniteIDApply", "InfiniteIDFacePose", "InfiniteIDStylePreset"),
    "Choosing": ("InfiniteIDScore",),
    "Small faces": ("InfiniteIDFaceCrop", "InfiniteIDFacePaste"),
}

INTRODUCTION = """\
# Nodes

All nodes are in the category `Infinite-ID`. This is the text of their help pages, which ComfyUI
shows when you select a node and press the ⓘ above it.

The short way:

```
Infinite-ID Loader ─┐
Load Image ──────── Person ─ KSampler ─ VAE Decode ─ Save Image
Load Checkpoint ────┘
```

The same in single nodes:

```
Load Image ─ Align Face ─ Encode ─┐
Load Checkpoint ───────────────── Apply ─ KSampler ─ VAE Decode ─ Save Image
Load Adapter ─────────────────────┘
```

The wires in between are `INFINITE_ID` (an adapter and all that reads photos for it), `FACEANALYSIS`
(insightface's own object, shared with the InstantID and PuLID packs), `INFINITE_ID_FACES`,
`IDENTITY`, `INFINITE_ID_ADAPTER` and `INFINITE_ID_REGION`.
"""


def reference() -> str:
    """The text of docs/nodes.md. Raises ``KeyError`` for nodes that are in no chapter."""
    listed = {node for nodes in CHAPTERS.values() for node in nodes}
    if listed != set(NODE_IDS):
        raise KeyError(f"not in one chapter each: {sorted(listed ^ set(NODE_IDS))}")
    parts = [INTRODUCTION]
    for chapter, nodes in CHAPTERS.items():
        parts.append(f"## {chapter}\n")
        parts += [_demoted(node) for node in nodes]
    return "\n".join(parts)


def _demoted(node: str) -> str:
    """A help page as a section below a chapter, with the id that workflows know the node by."""
    lines = (HELP / f"{node}.md").read_text(encoding="utf-8").splitlines()
    title, *body = lines
    moved = [f"##{line}" if line.startswith("#") else line for line in body]
    return "\n".join([f"##{title}", "", f"`{node}`", *moved, ""])


def english_labels(info: dict[str, Any]) -> dict[str, Any]:
    """The texts of our nodes in the layout of a nodeDefs.json; ``info``: /object_info."""
    return {node: _labels(info[node]) for node in sorted(NODE_IDS)}


def _labels(info: dict[str, Any]) -> dict[str, Any]:
    inputs = {
        name: {"name": name, "tooltip": spec[1]["tooltip"]}
        for part in ("required", "optional")
        for name, spec in (info["input"].get(part) or {}).items()
    }
    outputs = {}
    named = zip(info["output_name"], info["output_tooltips"], strict=True)
    for number, (name, tooltip) in enumerate(named):
        outputs[str(number)] = {"name": name} | ({"tooltip": tooltip} if tooltip else {})
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def write_json(path: Path, content: Any) -> None:
    """As people read and edit it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    from run import find_host

    from .comfy_live import ComfyServer

    REFERENCE.write_text(reference(), encoding="utf-8", newline="\n")
    host = find_host()
    if host is None:
        print("No ComfyUI found: set COMFYUI_PATH, or run python run.py setup.", file=sys.stderr)
        return 1
    with ComfyServer(host=host, pack=ROOT, cpu=True) as server:
        labels = english_labels(server.object_info())
    write_json(LOCALES / "en" / "nodeDefs.json", labels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
