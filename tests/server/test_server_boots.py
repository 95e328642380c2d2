"""A live ComfyUI with the pack: it starts, knows the nodes, runs a workflow graph."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools.comfy_client import NodeFailed, PromptRejected, ServerDied
from tools.comfy_live import ComfyServer
from tools.node_ids import NODE_IDS
from tools.workflow_api import UnknownNode


def node(
    number: int,
    kind: str,
    values: list[Any] | None = None,
    *,
    inputs: dict[str, tuple[str, int]] | None = None,
    outputs: tuple[str, ...] = (),
    mode: int = 0,
) -> dict[str, Any]:
    """One node of a workflow file; `inputs` maps a name to (type, link)."""
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "inputs": [{"name": n, "type": t, "link": k} for n, (t, k) in (inputs or {}).items()],
        "outputs": [{"name": t, "type": t} for t in outputs],
        "widgets_values": values or [],
    }


def inverted_blue() -> dict[str, Any]:
    """EmptyImage (blue) -> ImageInvert -> SaveImage, as the page saves it."""
    return {
        "nodes": [
            node(1, "EmptyImage", [48, 32, 1, 0x0000FF], outputs=("IMAGE",)),
            node(2, "ImageInvert", inputs={"image": ("IMAGE", 1)}, outputs=("IMAGE",)),
            node(3, "SaveImage", ["made"], inputs={"images": ("IMAGE", 2)}),
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
    }


def picture(server: ComfyServer, graph: dict[str, Any]) -> Image.Image:
    result = server.run(server.to_api(graph), timeout=120)
    return Image.open(io.BytesIO(server.fetch(result.images("3")[0]))).convert("RGB")


def test_every_node_is_served(server: ComfyServer) -> None:
    info = server.object_info()
    assert [node_id for node_id in NODE_IDS if node_id not in info] == []
    log = server.log_path.read_text(encoding="utf-8")
    assert "Cannot import" not in log
    assert "Unable to parse pyproject.toml" not in log


def test_graph_runs_to_a_picture(server: ComfyServer) -> None:
    made = picture(server, inverted_blue())
    assert made.size == (48, 32)
    assert made.getpixel((0, 0)) == (255, 255, 0)


def test_bypassed_node_passes_its_input_on(server: ComfyServer) -> None:
    graph = inverted_blue()
    graph["nodes"][1]["mode"] = 4
    assert picture(server, graph).getpixel((0, 0)) == (0, 0, 255)


def test_uploaded_picture_comes_back(server: ComfyServer, tmp_path: Path) -> None:
    photo = tmp_path / "red.png"
    Image.new("RGB", (20, 10), (255, 0, 0)).save(photo)
    graph = inverted_blue()
    graph["nodes"][0] = node(1, "LoadImage", [server.upload(photo), "image"], outputs=("IMAGE",))
    assert picture(server, graph).getpixel((0, 0)) == (0, 255, 255)


def test_missing_node_is_named(server: ComfyServer) -> None:
    graph = inverted_blue()
    graph["nodes"][1]["type"] = "NoSuchNode"
    with pytest.raises(UnknownNode, match="Node 2 has the type 'NoSuchNode'"):
        server.to_api(graph)


def test_rejected_prompt_names_node_and_input(server: ComfyServer) -> None:
    graph = inverted_blue()
    graph["nodes"][0]["widgets_values"][0] = -1
    with pytest.raises(PromptRejected, match=r"node 1 \(EmptyImage\).*width"):
        server.queue(server.to_api(graph))


def test_failing_node_is_named_and_the_server_lives_on(server: ComfyServer) -> None:
    graph = inverted_blue()
    graph["nodes"][2]["widgets_values"] = ["../../outside"]
    with pytest.raises(NodeFailed) as caught:
        server.run(server.to_api(graph), timeout=120)
    assert (caught.value.node_id, caught.value.node_type) == ("3", "SaveImage")
    assert "outside the output folder" in caught.value.exception_message
    assert picture(server, inverted_blue()).size == (48, 32)


def test_server_that_dies_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "cli_args.py").write_text("", encoding="utf-8")
    (tmp_path / "main.py").write_text("raise SystemExit('no such luck')", encoding="utf-8")
    broken = ComfyServer(host=tmp_path, cpu=True)
    with pytest.raises(ServerDied, match="exit code 1 before it was ready(?s:.*)no such luck"):
        broken.start(timeout=60)
    assert not broken.base.exists()
