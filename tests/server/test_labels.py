"""What ComfyUI hands out beside the nodes: labels, help pages, workflow templates."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from typing import Any

import pytest

from tools.comfy_live import PACK_FOLDER, ComfyServer
from tools.make_docs import HELP, LOCALES, english_labels
from tools.make_workflows import FOLDER
from tools.node_ids import NODE_IDS


def keys(tree: Any, path: str = "") -> set[str]:
    """Every text's place in a tree of dictionaries."""
    if not isinstance(tree, dict):
        return {path}
    return {found for name, below in tree.items() for found in keys(below, f"{path}/{name}")}


def texts(tree: Any) -> list[str]:
    return [tree] if isinstance(tree, str) else [t for below in tree.values() for t in texts(below)]


@pytest.fixture(scope="module")
def labels(server: ComfyServer) -> dict[str, Any]:
    """Our part of what the page reads, by language."""
    served = server.get("/i18n")
    return {
        language: {node: content["nodeDefs"].get(node) for node in NODE_IDS}
        for language, content in served.items()
    }


def test_english_labels_are_the_nodes_own(server: ComfyServer, labels: dict[str, Any]) -> None:
    """If this fails, run python -m tools.make_docs."""
    assert labels["en"] == english_labels(server.object_info())


def test_chinese_labels_are_complete(labels: dict[str, Any]) -> None:
    assert keys(labels["zh"]) == keys(labels["en"])
    assert all(text.strip() for text in texts(labels["zh"]))
    tooltips = [
        entry["tooltip"]
        for node in labels["zh"].values()
        for entry in (*node["inputs"].values(), *node["outputs"].values())
    ]
    assert [t for t in tooltips if not any("\u4e00" <= letter <= "\u9fff" for letter in t)] == []


def test_every_language_is_one_of_the_pages(labels: dict[str, Any]) -> None:
    assert {folder.name for folder in LOCALES.iterdir()} <= labels.keys()


@pytest.mark.parametrize("node", NODE_IDS)
def test_help_page_names_every_input_and_output(server: ComfyServer, node: str) -> None:
    address = f"{server.url}/extensions/{PACK_FOLDER}/docs/{node}.md"
    with urllib.request.urlopen(address, timeout=30) as answer:
        page = answer.read().decode()
    assert page == (HELP / f"{node}.md").read_text(encoding="utf-8")
    info = server.object_info()[node]
    assert page.startswith(f"# {info['display_name']}\n")
    named = {
        name.strip()
        for line in page.splitlines()
        if line.startswith("| ")
        for name in line.split("|")[1].split(",")
    }
    for part in ("required", "optional"):
        assert set(info["input"].get(part) or {}) - named == set()
    assert set(info["output_name"]) - named == set()


def test_every_node_explains_itself(server: ComfyServer) -> None:
    for node in NODE_IDS:
        info = server.object_info()[node]
        assert info["description"]
        assert all(info["output_tooltips"]), node
        for part in ("required", "optional"):
            for name, spec in (info["input"].get(part) or {}).items():
                assert spec[1].get("tooltip"), f"{node}.{name}"


def test_workflows_are_templates(server: ComfyServer) -> None:
    offered = server.get("/workflow_templates")[PACK_FOLDER]
    assert set(offered) == {path.stem for path in FOLDER.glob("*.json")}
    name = urllib.parse.quote(f"{sorted(offered)[0]}.json")
    served = server.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}")
    assert served == json.loads((FOLDER / f"{sorted(offered)[0]}.json").read_text(encoding="utf-8"))
