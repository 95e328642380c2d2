"""Every workflow in ComfyUI's page, in a headless Chromium: opened, run, read, explained.

The page is the one that the host pins; INFINITE_ID_FRONTEND names another (tools/frontend.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tools import frontend
from tools.comfy_live import ComfyServer
from tools.make_docs import LOCALES
from tools.make_workflows import FOLDER, WORKFLOWS
from tools.page import NODES_2, Page, find_browser

from .references import upload_references

ROOT = Path(__file__).resolve().parents[2]
BROWSER = find_browser() or ""
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")

NOTHING = {"missing": [], "red": [], "dialogs": []}
VERSION, ARGUMENTS = frontend.shown()
RENDERERS = {"canvas": {NODES_2: False}}
if Version(VERSION).release >= (
    1,
    48,
):  # 1.27 tries Nodes 2.0, and draws no text and no picture in them
    RENDERERS["nodes 2"] = {NODES_2: True}

# What the `sdxl` workflows name: pages since 1.48 mark a node red whose file is not in the list.
MODEL_FILES = (
    "checkpoints/sd_xl_base_1.0.safetensors",
    "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    "infinite_id/infinite-id-sdxl.safetensors",
    "insightface/models/buffalo_l/det_10g.onnx",
)


def workflow(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server of its own that lacks no file, and keeps no result: what is asked for, runs."""
    arguments = ("--cache-none", *ARGUMENTS)
    host = Path(os.environ["COMFYUI_PATH"])
    with ComfyServer(host=host, pack=ROOT, cpu=True, extra_args=arguments) as running:
        for name in MODEL_FILES:
            file = running.base / "models" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        upload_references(running, tmp_path_factory.mktemp("references"))
        running.run(running.to_api(workflow("save_identity.micro")))  # use_saved_identity's file
        yield running


@pytest.fixture(scope="module", params=RENDERERS)
def page(request: pytest.FixtureRequest, served: ComfyServer) -> Iterator[Page]:
    """One page for all of this file, drawn in either way."""
    with Page(BROWSER, served.url, settings=RENDERERS[request.param]) as opened:
        yield opened


def test_the_page_is_of_the_release_that_is_meant(page: Page) -> None:
    assert page.run("window.__COMFYUI_FRONTEND_VERSION__") == VERSION


@pytest.mark.parametrize("file", [f"{n}.{kind}" for n in WORKFLOWS for kind in ("micro", "sdxl")])
def test_opens_with_nothing_missing(page: Page, file: str) -> None:
    graph = workflow(file)
    page.open_workflow(graph)
    assert page.trouble() == NOTHING
    assert page.overlaps() == []
    assert page.outside() == []
    links = page.run("[...window.app.graph.links.values()].length")
    assert links == len(graph["links"])
    # The page reads the values as we wrote them: none has slipped to its neighbour.
    values = page.run(
        "window.app.graph._nodes.map(n => [String(n.id), n.type, (n.widgets || [])"
        ".filter(w => w.serialize !== false && w.type !== 'button').map(w => w.value)])"
    )
    written = {str(n["id"]): n["widgets_values"] for n in graph["nodes"]}
    for number, kind, found in values:
        if kind not in ("MarkdownNote", "LoadImage"):
            assert found == written[number], kind


@pytest.mark.parametrize("name", WORKFLOWS)
def test_embedded_workflow_runs_from_the_page(page: Page, served: ComfyServer, name: str) -> None:
    """As it is; for Nodes 2.0, which is about how nodes are drawn, with fewer steps."""
    graph = workflow(f"{name}.micro")
    if page.run(f"window.app.ui.settings.getSettingValue('{NODES_2}')"):
        sampler = next(n for n in graph["nodes"] if n["type"] == "KSampler")
        sampler["widgets_values"][2] = 4
    saved = served.base / "output" / "infinite-id"
    before = set(saved.glob("*.png"))
    page.open_workflow(graph)
    page.queue()
    assert page.trouble() == NOTHING
    assert page.overlaps() == []  # with the pictures that nodes show by now
    assert len(set(saved.glob("*.png")) - before) == 1


def test_unknown_nodes_would_be_seen(page: Page) -> None:
    """The check itself: a graph with a node of nobody's does show as trouble."""
    graph = workflow("one_face.micro")
    graph["nodes"][0]["type"] = "InfiniteIDNobody"
    page.open_workflow(graph)
    assert page.trouble()["missing"] == ["InfiniteIDNobody"]
    page.press("Escape")  # the dialog that says so
    page.until("![...document.querySelectorAll('[role=dialog]')].some(d => d.checkVisibility())")


def test_covered_nodes_would_be_seen(page: Page) -> None:
    """The other checks: a node moved over its neighbour's title, out of its group."""
    graph = workflow("one_face.micro")
    covered, moved = graph["nodes"][:2]
    moved["pos"] = [covered["pos"][0] - 50, covered["pos"][1] - 20 - moved["size"][1]]
    page.open_workflow(graph)
    names = [f"{node['type']} {node['id']}" for node in (moved, covered)]
    assert page.overlaps() == [f"{names[0]} and {names[1]}"]
    assert page.outside() == [names[0]]


def test_labels_follow_the_language(served: ComfyServer) -> None:
    try:
        with Page(BROWSER, served.url, settings={"Comfy.Locale": "zh"}) as page:
            page.open_workflow(workflow("one_face.micro"))
            node = "window.app.graph._nodes.find(n => n.type === 'InfiniteIDApply')"
            labels = page.run(f"{node}.widgets.map(w => w.label)")
            title = page.run(f"{node}.title")
    finally:
        with Page(BROWSER, served.url):  # sets the language back for the other tests
            pass
    chinese = json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert title == chinese["InfiniteIDApply"]["display_name"]
    assert chinese["InfiniteIDApply"]["inputs"]["style_strength"]["name"] in labels


def test_help_opens_from_the_node(page: Page) -> None:
    page.open_workflow(workflow("one_face.micro"))
    node = "window.app.graph._nodes.find(n => n.type === 'InfiniteIDApply')"
    page.run(f"window.app.canvas.selectNode({node}); window.app.canvas.setDirty(true, true)")
    page.until("document.querySelector('[data-testid=info-button]')")
    page.run("document.querySelector('[data-testid=info-button]').click()")
    page.until("document.body.innerText.includes('How it works')")
