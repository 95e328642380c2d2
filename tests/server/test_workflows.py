"""Every workflow: the committed files are what the builder makes, and they run to a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools.comfy_client import NodeFailed
from tools.comfy_live import ComfyServer
from tools.demo import show
from tools.make_workflows import FOLDER, WORKFLOWS, build
from tools.workflow_parts import EMBEDDED, REFERENCE

from .references import upload_references

# A combo of file names offers what is on this machine's disk.
FILE_INPUTS = {"adapter", "ckpt_name", "clip_name", "file", "pack", "image"}


def workflow(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def ready(server: ComfyServer, tmp_path_factory: Any) -> ComfyServer:
    upload_references(server, tmp_path_factory.mktemp("references"))
    return server


def run(server: ComfyServer, name: str, photo: str = "", **changes: Any) -> np.ndarray:
    """Run an embedded workflow with fewer steps; its saved picture [H, W, 3].

    `photo`: an uploaded file in place of the made portraits.
    """
    prompt = server.to_api(workflow(f"{name}.micro"))
    if photo:
        show(prompt, photo)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 4
        # Values only: a link of the same name is somebody else's input.
        given = {k for k, v in node["inputs"].items() if not isinstance(v, list)}
        node["inputs"].update({k: v for k, v in changes.items() if k in given})
    result = server.run(prompt, timeout=300)
    saved = [i for i in result.images() if i.type == "output"]
    assert len(saved) == 1
    return np.asarray(Image.open(io.BytesIO(server.fetch(saved[0]))).convert("RGB"))


def test_files_are_the_builders(ready: ComfyServer) -> None:
    made = build(ready.object_info())
    assert {p.name for p in FOLDER.glob("*.json")} == made.keys()
    for name, content in made.items():
        assert json.loads((FOLDER / name).read_text(encoding="utf-8")) == content, name


@pytest.mark.parametrize("name", [n for n in WORKFLOWS if n != "use_saved_identity"])
def test_embedded_workflow_makes_a_picture(ready: ComfyServer, name: str) -> None:
    picture = run(ready, name)
    sizes = {"small_face_detail": (256, 256, 3), "one_stream_and_two": (128, 256, 3)}
    size = sizes.get(name, (128, 128, 3))
    assert picture.shape == size
    assert picture.std() > 5


def test_saved_identity_paints_the_same_person(ready: ComfyServer) -> None:
    """The file stands for the photo: same prompt, same seed, same picture."""
    kept = run(ready, "save_identity")
    assert (ready.base / "models/infinite_id_identities/my person.safetensors").is_file()
    prompt = next(
        n["widgets_values"][0]
        for n in workflow("save_identity.micro")["nodes"]
        if n.get("title") == "Prompt"
    )
    again = ready.to_api(workflow("use_saved_identity.micro"))
    titles = {k: n["_meta"]["title"] for k, n in again.items()}
    for key, node in again.items():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 4
        if titles[key] == "Prompt":
            node["inputs"]["text"] = prompt
    result = ready.run(again, timeout=300)
    found = np.asarray(Image.open(io.BytesIO(ready.fetch(result.images()[-1]))).convert("RGB"))
    assert np.abs(found.astype(int) - kept.astype(int)).max() <= 1


def test_identity_strength_matters(ready: ComfyServer) -> None:
    with_identity = run(ready, "one_face").astype(int)
    without = run(ready, "one_face", strength=0.0).astype(int)
    assert np.abs(with_identity - without).mean() > 1


def test_no_face_is_named_in_the_page(ready: ComfyServer, tmp_path: Path) -> None:
    Image.new("RGB", (256, 256), "teal").save(tmp_path / "nobody.png")
    with pytest.raises(NodeFailed, match="(?s)NoFaceError|No face") as caught:
        run(ready, "one_face", photo=ready.upload(tmp_path / "nobody.png"))
    assert caught.value.node_type == "InfiniteIDAlignFace"
    assert run(ready, "one_face", photo=REFERENCE).shape == (128, 128, 3)  # nothing left behind


def test_the_number_of_the_portrait_is_the_person(ready: ComfyServer) -> None:
    """The embedded workflows run as they are, and paint whom they are told to."""
    assert "LoadImage" not in json.dumps([workflow(f"{n}.micro") for n in WORKFLOWS])
    first, second = (run(ready, "one_face", person=n).astype(int) for n in (0, 1))
    assert np.abs(first - second).mean() > 1


@pytest.mark.parametrize("name", list(WORKFLOWS))
def test_sdxl_twin_fits_the_nodes(ready: ComfyServer, name: str) -> None:
    """Same graph but for the loaders; every input is filled with a value its node allows."""
    info = ready.object_info()
    for node in ready.to_api(workflow(f"{name}.sdxl")).values():
        described = info[node["class_type"]]["input"]
        for part in ("required", "optional"):
            for key, spec in (described.get(part) or {}).items():
                assert part == "optional" or key in node["inputs"], (node["class_type"], key)
                value = node["inputs"].get(key)
                choices = spec[0] if isinstance(spec[0], list) else None
                if choices is None and spec[0] == "COMBO":
                    choices = spec[1]["options"]
                if choices is not None and key not in FILE_INPUTS and not isinstance(value, list):
                    assert value in choices, (node["class_type"], key, value)
    values = json.dumps(workflow(f"{name}.sdxl"))
    assert EMBEDDED not in values and "InfiniteIDMicroModel" not in values
