"""The demo's pictures: from ComfyUI, and the same ones without it."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools import demo
from tools.comfy_live import ComfyServer
from tools.strip import GAP, HEIGHT
from tools.without_comfyui import Diffusers, to_api


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    return content


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in prompt.items()}


def test_the_workflow_is_read_as_the_server_reads_it(
    server: ComfyServer, graph: dict[str, Any]
) -> None:
    assert without_titles(to_api(graph)) == without_titles(server.to_api(graph))


@pytest.mark.parametrize("style", ["photo", "sketch"])
def test_both_make_the_same_picture(server: ComfyServer, graph: dict[str, Any], style: str) -> None:
    pictures = []
    for host in (server, Diffusers()):
        photo = host.upload(demo.made_portrait(), "made.png")
        prompt = host.to_api(graph)
        demo.fill_in(prompt, photo, demo.SCENES[style], style, 11)
        data = demo.make_picture(host, prompt)
        pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int))
    there, here = pictures
    assert there.shape == here.shape == (128, 128, 3)
    assert there.std() > 5
    assert np.abs(there - here).mean() < 1  # of 255; a rounding that falls the other way is 1


def test_the_server_paints_the_strip_and_keeps_its_models(
    server: ComfyServer, tmp_path: Path, graph: dict[str, Any]
) -> None:
    loaders = {str(n["id"]) for n in graph["nodes"] if n["type"].endswith(("Loader", "MicroModel"))}
    worked: list[set[str]] = []
    run = server.run

    def watched(prompt: dict[str, Any], *, on_event: Any) -> Any:
        worked.append(set())

        def note(kind: str, data: dict[str, Any]) -> None:
            if kind == "executing" and data["node"]:
                worked[-1].add(data["node"])
            on_event(kind, data)

        return run(prompt, on_event=note)

    options = Namespace(
        prompt=None, style=None, seed=None, reference=None, workflow=demo.WORKFLOW, output=tmp_path
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "run", watched)
        made = Image.open(demo.make(server, options))
    assert made.width == 5 * HEIGHT + 4 * GAP and made.height > HEIGHT
    assert len(worked) == 4
    assert all(nodes and not nodes & loaders for nodes in worked[1:])
