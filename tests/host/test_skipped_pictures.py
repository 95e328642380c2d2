"""Batches in which some pictures lack the wanted face, through ComfyUI's executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from skimage import data

from nodes import NODE_CLASS_MAPPINGS

from .executor import Executor, Kept, Prompt, executed, failures, load_kept

EMBEDDED = "microworld (embedded)"


def one() -> np.ndarray:
    """A picture with one face, as wide as one with two."""
    return np.concatenate([data.astronaut(), np.zeros_like(data.astronaut())], axis=1)


def two() -> np.ndarray:
    return np.concatenate([data.astronaut(), data.astronaut()[:, ::-1]], axis=1)


def none() -> np.ndarray:
    return np.zeros_like(two())


PICTURES = {"one": one, "two": two, "none": none}


@pytest.fixture(scope="module")
def executor(pack: Any) -> Executor:
    load_kept()
    for name, paint in PICTURES.items():
        Image.fromarray(paint()).save(Path(folder_paths.get_input_directory()) / f"{name}.png")
    return Executor()


def batch(*names: str) -> Prompt:
    """Nodes that read the pictures and put them together, the last of them ``batch``."""
    prompt: Prompt = {}
    for number, name in enumerate(names):
        prompt[f"image {number}"] = {"class_type": "LoadImage", "inputs": {"image": f"{name}.png"}}
    last = "image 0"
    for number in range(1, len(names)):
        together = {"image1": [last, 0], "image2": [f"image {number}", 0]}
        prompt[f"batch {number}"] = {"class_type": "ImageBatch", "inputs": together}
        last = f"batch {number}"
    prompt["batch"] = {"class_type": "ImageScale", "inputs": {
        "image": [last, 0], "upscale_method": "nearest-exact", "width": 1024, "height": 512,
        "crop": "disabled"}}  # fmt: skip
    models = {"pack": EMBEDDED, "provider": "CPU", "detector_size": 640}
    prompt["models"] = {"class_type": "InfiniteIDFaceModelLoader", "inputs": models}
    return prompt


def detail_pass(*names: str, **changes: Any) -> Prompt:
    """Face Crop, the crop turned into its negative, Face Paste."""
    crop = {"face_analysis": ["models", 0], "image": ["batch", 0], "choose": "largest", "index": 0,
            "order": "left to right", "padding": 0.5, "size": 128} | changes  # fmt: skip
    paste = {"image": ["batch", 0], "crop": ["repaint", 0], "region": ["crop", 1], "feather": 0.15}
    return {
        **batch(*names),
        "crop": {"class_type": "InfiniteIDFaceCrop", "inputs": crop},
        "repaint": {"class_type": "ImageInvert", "inputs": {"image": ["crop", 0]}},
        "paste": {"class_type": "InfiniteIDFacePaste", "inputs": paste},
        "out": {"class_type": "Kept", "inputs": {"source": ["paste", 0]}},
    }


def pixels(*names: str) -> torch.Tensor:
    return torch.stack([torch.from_numpy(PICTURES[name]()) for name in names]).float() / 255


def test_skipped_pictures_come_back_unchanged(executor: Executor) -> None:
    prompt = detail_pass("one", "none", "two", if_no_face="skip")
    assert executor.validate(prompt) == {}
    assert failures(executor.run(prompt, ["out"])) == []
    changed = (Kept.last - pixels("one", "none", "two")).abs().amax(dim=(1, 2, 3))
    assert changed[0] > 0.5 and changed[1] < 1e-6 and changed[2] > 0.5


def test_a_batch_without_any_face_comes_back_and_nothing_is_painted(executor: Executor) -> None:
    events = executor.run(detail_pass("none", "none", if_no_face="skip"), ["out"])
    assert failures(events) == []
    assert "repaint" not in executed(events) and "paste" in executed(events)
    assert (Kept.last - pixels("none", "none")).abs().max() < 1e-6


def test_the_number_of_the_face_decides_as_well(executor: Executor) -> None:
    prompt = detail_pass("one", "two", choose="index", index=1, if_no_face="skip")
    assert failures(executor.run(prompt, ["out"])) == []
    changed = (Kept.last - pixels("one", "two")).abs().amax(dim=(1, 3))  # by column
    assert changed[0].max() < 1e-6
    assert changed[1, :512].max() < 1e-6 and changed[1, 512:].max() > 0.5


@pytest.mark.parametrize("changes", [{}, {"if_no_face": "error"}])
def test_an_older_workflow_stops_as_it_did(executor: Executor, changes: dict[str, str]) -> None:
    prompt = detail_pass("one", "none", **changes)
    assert executor.validate(prompt) == {}
    (failed,) = failures(executor.run(prompt, ["out"]))
    assert failed["exception_type"].endswith(".NoFaceError")
    assert "picture 1 of 2" in failed["exception_message"]


def test_what_is_shown_of_the_crop_says_why_there_is_none(executor: Executor) -> None:
    prompt = detail_pass("none", if_no_face="skip")
    prompt["look"] = {"class_type": "Kept", "inputs": {"source": ["crop", 0]}}
    (told,) = failures(executor.run(prompt, ["out", "look"]))
    assert told["node_id"] == "look" and "No face was found" in told["exception_message"]
    assert (Kept.last - pixels("none")).abs().max() < 1e-6  # the rest of the graph has run


# --- Align Face ------------------------------------------------------------------------------


def align(*names: str, **changes: Any) -> Any:
    (analysis,) = (
        NODE_CLASS_MAPPINGS["InfiniteIDFaceModelLoader"].execute(EMBEDDED, "CPU", 640).args
    )
    values = {"choose": "index", "index": 1, "order": "left to right", "padding": 0.25,
              "if_no_face": "skip"} | changes  # fmt: skip
    return NODE_CLASS_MAPPINGS["InfiniteIDAlignFace"].execute(analysis, pixels(*names), **values)


def test_align_skips_a_frame_with_fewer_faces(pack: Any) -> None:
    faces, crops, preview, count = align("one", "two", "none", "two").args
    assert count == len(faces) == len(crops) == 2 and [face.frame for face in faces] == [1, 3]
    assert all(face.index == 1 and face.detected.box[0] > 512 for face in faces)
    assert len(preview) == 4


def test_align_names_the_frame_with_fewer_faces(pack: Any) -> None:
    with pytest.raises(pack.infinite_id_core.errors.FaceIndexError, match="picture 1 of 2"):
        align("two", "one", if_no_face="error")


def test_all_frames_with_fewer_faces_block_what_follows(pack: Any) -> None:
    faces, crops, preview, count = align("one", "two", index=7).args
    assert isinstance(faces, ExecutionBlocker) and isinstance(crops, ExecutionBlocker)
    assert "no picture shows more than 2" in faces.message
    assert count == 0 and len(preview) == 2
