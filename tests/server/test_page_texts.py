"""What nodes say in ComfyUI's page, in both of its renderers: Save Identity's and Score's texts,
and Align Face's numbered preview, also where the node fails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools import frontend
from tools.comfy_live import ComfyServer
from tools.make_workflows import FOLDER
from tools.page import NODES_2, Page, find_browser

ROOT = Path(__file__).resolve().parents[2]
BROWSER = find_browser() or ""
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")

EMBEDDED = "microworld (embedded)"
# Node -> its values, and from where its inputs come.
GRAPH: dict[str, tuple[dict[str, Any], dict[str, tuple[str, int]]]] = {
    "InfiniteIDMicroPortrait": ({"person": 5}, {}),
    "InfiniteIDFaceModelLoader": ({"pack": EMBEDDED}, {}),
    "InfiniteIDOpenClipLoader": ({"model": EMBEDDED}, {}),
    "InfiniteIDAlignFace": ({}, {"face_analysis": ("InfiniteIDFaceModelLoader", 0),
                                 "image": ("InfiniteIDMicroPortrait", 0)}),
    "InfiniteIDEncode": ({}, {"faces": ("InfiniteIDAlignFace", 0),
                              "clip_vision": ("InfiniteIDOpenClipLoader", 0)}),
    "InfiniteIDSaveIdentity": ({"name": "page text", "if_exists": "overwrite"},
                               {"identity": ("InfiniteIDEncode", 0)}),
    "InfiniteIDScore": ({}, {"images": ("InfiniteIDMicroPortrait", 0),
                             "face_analysis": ("InfiniteIDFaceModelLoader", 0),
                             "identity": ("InfiniteIDEncode", 0)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(server: ComfyServer) -> Iterator[ComfyServer]:
    """The host with its own page, or with the one that INFINITE_ID_FRONTEND names."""
    _, arguments = frontend.shown()
    if not arguments:
        yield server
        return
    host = Path(os.environ["COMFYUI_PATH"])
    with ComfyServer(host=host, pack=ROOT, cpu=True, extra_args=arguments) as running:
        yield running


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes 2"])
def page(request: pytest.FixtureRequest, served: ComfyServer) -> Iterator[Page]:
    """One page for all of this file, drawn in either way."""
    with Page(BROWSER, served.url, settings={NODES_2: request.param}) as opened:
        yield opened


def build(page: Page, **changes: dict[str, Any]) -> None:
    """Put the graph on the page as a user does, node by node; ``changes``: values by node."""
    page.run("window.app.graph.clear()")
    for number, (kind, (given, inputs)) in enumerate(GRAPH.items()):
        values = json.dumps(given | changes.get(kind, {}))
        page.run(
            f"""(() => {{
            const graph = window.app.graph;
            const find = kind => graph._nodes.find(node => node.type === kind);
            const node = LiteGraph.createNode({json.dumps(kind)});
            node.pos = [{number} * 500, 0];
            graph.add(node);
            for (const [name, value] of Object.entries({values}))
                node.widgets.find(widget => widget.name === name).value = value;
            for (const [name, [source, slot]] of Object.entries({json.dumps(inputs)}))
                find(source).connect(slot, node, node.findInputSlot(name));
            }})()"""
        )


def look_at(page: Page, kind: str) -> None:
    """Bring a node to the middle of the window, at its own size."""
    page.run(
        f"""(() => {{
        const canvas = window.app.canvas;
        const node = window.app.graph._nodes.find(node => node.type === {json.dumps(kind)});
        canvas.ds.scale = 1.0;
        canvas.ds.offset[0] = 600 - node.pos[0];
        canvas.ds.offset[1] = 300 - node.pos[1];
        canvas.setDirty(true, true);
        }})()"""
    )


def visible(selector: str, condition: str) -> str:
    """JavaScript: whether an element ``e`` for which ``condition`` holds is seen in the window."""
    return (
        f"[...document.querySelectorAll({json.dumps(selector)})].some(e => {{"
        "const box = e.getBoundingClientRect();"
        "return e.checkVisibility() && box.width > 40 && box.height > 10"
        " && box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth"
        f" && {condition} }})"
    )


def says(words: str) -> str:
    return visible("pre, textarea", f"(e.value ?? e.textContent).includes({json.dumps(words)})")


def test_texts_are_shown_on_their_nodes(page: Page) -> None:
    build(page)
    page.queue()
    for _ in range(2):
        look_at(page, "InfiniteIDSaveIdentity")
        page.until(says("Saved page text.safetensors"))
        look_at(page, "InfiniteIDScore")
        page.until(says("M_face by microworld/rec"))
        page.queue()  # all of it is cached now
    # What is shown is no part of the workflow, nor of the prompt: else nothing would stay cached.
    script = "window.app.graphToPrompt().then(made => JSON.stringify(made))"
    made = json.loads(page.run(script))
    assert "Saved page text" not in json.dumps(made)
    assert "M_face" not in json.dumps(made)
    kinds = {node["class_type"]: node["inputs"] for node in made["output"].values()}
    assert set(kinds["InfiniteIDSaveIdentity"]) == {"identity", "name", "if_exists"}


def test_the_numbered_preview_is_shown_where_the_node_fails(
    page: Page, served: ComfyServer
) -> None:
    build(page, InfiniteIDAlignFace={"choose": "index", "index": 7})
    page.queue()
    look_at(page, "InfiniteIDAlignFace")
    node = "window.app.graph._nodes.find(node => node.type === 'InfiniteIDAlignFace')"
    page.until(f"(window.app.nodeOutputs[{node}.id]?.images ?? []).length === 1")
    # One renderer draws on the canvas, the other has elements.
    drawn = f"({node}.imgs ?? []).some(image => image.naturalWidth > 100)"
    page.until(f"({drawn}) || {visible('[data-node-id] img', 'e.naturalWidth > 100')}")
    last = max(served.get("/history").values(), key=lambda entry: entry["prompt"][0])
    (failed,) = [data for kind, data in last["status"]["messages"] if kind == "execution_error"]
    assert failed["exception_type"].endswith("FaceIndexError")


def test_a_workflow_from_before_the_last_input_opens(page: Page) -> None:
    """Inputs are added at the end, so that the values of older files stay with theirs."""
    graph = json.loads((FOLDER / "small_face_detail.micro.json").read_text(encoding="utf-8"))
    old = next(node for node in graph["nodes"] if node["type"] == "InfiniteIDFaceCrop")
    assert old["widgets_values"].pop() == "error"
    page.open_workflow(graph)
    assert page.trouble()["red"] == []
    node = "window.app.graph._nodes.find(node => node.type === 'InfiniteIDFaceCrop')"
    values = page.run(f"{node}.widgets.map(widget => widget.value)")
    assert values == [*old["widgets_values"], "error"]
