"""Every workflow opens in ComfyUI's page, in a headless Chromium, with nothing missing or red."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tools.comfy_live import ComfyServer
from tools.make_docs import LOCALES
from tools.make_workflows import FOLDER, WORKFLOWS
from tools.page import Page, find_browser

from .references import upload_references

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(server: ComfyServer, tmp_path_factory: Any) -> Iterator[Page]:
    upload_references(server, tmp_path_factory.mktemp("references"))
    assert BROWSER is not None
    with Page(BROWSER, server.url) as opened:
        yield opened


@pytest.mark.parametrize("file", [f"{n}.{kind}" for n in WORKFLOWS for kind in ("micro", "sdxl")])
def test_opens_with_nothing_missing(page: Page, file: str) -> None:
    graph = json.loads((FOLDER / f"{file}.json").read_text(encoding="utf-8"))
    page.open_workflow(graph)
    assert page.trouble() == {"missing": [], "red": [], "dialogs": []}
    links = page.run("[...window.app.graph.links.values()].length")
    assert links == len(graph["links"])
    # The page reads the values as we wrote them: none has slipped to its neighbour.
    values = page.run(
        "window.app.graph._nodes.map(n => [n.id, (n.widgets || [])"
        ".filter(w => w.serialize !== false && w.type !== 'button').map(w => w.value)])"
    )
    written = {n["id"]: n["widgets_values"] for n in graph["nodes"]}
    for number, found in values:
        kind = next(n["type"] for n in graph["nodes"] if n["id"] == number)
        if kind not in ("MarkdownNote", "LoadImage"):
            assert found == written[number], kind


def test_unknown_nodes_would_be_seen(page: Page) -> None:
    """The check itself: a graph with a node of nobody's does show as trouble."""
    graph = json.loads((FOLDER / "one_face.micro.json").read_text(encoding="utf-8"))
    graph["nodes"][0]["type"] = "InfiniteIDNobody"
    page.open_workflow(graph)
    assert page.trouble()["missing"] == ["InfiniteIDNobody"]


def test_runs_from_the_page(page: Page, server: ComfyServer) -> None:
    page.run("document.querySelectorAll('.p-dialog-close-button').forEach(b => b.click())")
    graph = json.loads((FOLDER / "one_face.micro.json").read_text(encoding="utf-8"))
    saved = server.base / "output" / "infinite-id"
    before = set(saved.glob("one_face*.png"))
    page.open_workflow(graph)
    page.queue()
    assert page.trouble()["red"] == []
    assert len(set(saved.glob("one_face*.png")) - before) == 1


def test_labels_follow_the_language(server: ComfyServer) -> None:
    assert BROWSER is not None
    graph = json.loads((FOLDER / "one_face.micro.json").read_text(encoding="utf-8"))
    try:
        with Page(BROWSER, server.url, settings={"Comfy.Locale": "zh"}) as page:
            page.open_workflow(graph)
            node = "window.app.graph._nodes.find(n => n.type === 'InfiniteIDApply')"
            labels = page.run(f"{node}.widgets.map(w => w.label)")
            title = page.run(f"{node}.title")
    finally:
        with Page(BROWSER, server.url):  # sets the language back for the other tests
            pass
    chinese = json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert title == chinese["InfiniteIDApply"]["display_name"]
    assert chinese["InfiniteIDApply"]["inputs"]["style_strength"]["name"] in labels


def test_help_opens_from_the_node(page: Page) -> None:
    graph = json.loads((FOLDER / "one_face.micro.json").read_text(encoding="utf-8"))
    page.open_workflow(graph)
    page.fit()
    node = "window.app.graph._nodes.find(n => n.type === 'InfiniteIDApply')"
    page.run(f"window.app.canvas.selectNode({node}); window.app.canvas.setDirty(true, true)")
    page.until("document.querySelector('[data-testid=info-button]')")
    page.run("document.querySelector('[data-testid=info-button]').click()")
    page.until("document.body.innerText.includes('How it works')")
