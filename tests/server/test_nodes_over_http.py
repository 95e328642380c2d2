"""The nodes as a live ComfyUI's clients meet them: previews, missing files and wrong values."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infinite_id_core import errors
from tools.comfy_client import Event, ImageRef, NodeFailed, PromptRejected
from tools.comfy_live import ComfyServer

EMBEDDED = "microworld (embedded)"
Prompt = dict[str, dict[str, Any]]


def graph(person: int, **changes: Any) -> Prompt:
    """Portrait -> Align Face -> Encode -> Apply; its outputs are ``look`` and ``model``."""
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "portrait": ("InfiniteIDMicroPortrait", {"person": person, "size": 256}),
        "models": ("InfiniteIDFaceModelLoader",
                   {"pack": EMBEDDED, "provider": "CPU", "detector_size": 640}),
        "clip": ("InfiniteIDOpenClipLoader",
                 {"model": EMBEDDED, "weights_file": "none (embedded)"}),
        "adapter": ("InfiniteIDAdapterLoader", {"file": EMBEDDED}),
        "align": ("InfiniteIDAlignFace",
                  {"face_analysis": ["models", 0], "image": ["portrait", 0], "choose": "largest",
                   "index": 0, "order": "left to right", "padding": 0.25, "if_no_face": "error"}),
        "encode": ("InfiniteIDEncode", {"faces": ["align", 0], "clip_vision": ["clip", 0],
                                        "combine": "stack"}),
        "micro": ("InfiniteIDMicroModel", {}),
        "apply": ("InfiniteIDApply",
                  {"model": ["micro", 0], "adapter": ["adapter", 0], "identity": ["encode", 0],
                   "strength": 1.0, "mixing": "mixed", "style": "adain_mean",
                   "style_strength": 1.0, "merge_text": True, "text_stream": "own",
                   "start_percent": 0.0, "end_percent": 1.0}),
        "look": ("PreviewImage", {"images": ["align", 1]}),
        "model": ("PreviewAny", {"source": ["apply", 0]}),
    }  # fmt: skip
    prompt = {key: {"class_type": kind, "inputs": given} for key, (kind, given) in nodes.items()}
    for name, value in changes.items():
        key, _, given = name.partition("_")
        prompt[key]["inputs"][given] = value
    return prompt


def picture(server: ComfyServer, image: dict[str, str]) -> np.ndarray:
    reference = ImageRef(**{k: image[k] for k in ("filename", "subfolder", "type")})
    return np.asarray(Image.open(io.BytesIO(server.fetch(reference))).convert("RGB"))


# --- previews --------------------------------------------------------------------------------


def test_previews_stay_when_all_is_cached(server: ComfyServer) -> None:
    first = server.run(graph(21)).outputs
    worked: list[str] = []

    def note(kind: str, data: dict[str, Any]) -> None:
        if kind == "executing" and data["node"]:
            worked.append(data["node"])

    again = server.run(graph(21), on_event=note).outputs
    assert worked == []
    for node in ("portrait", "align"):
        assert again[node]["images"] == first[node]["images"]
        assert picture(server, again[node]["images"][0]).shape == (256, 256, 3)


def test_the_numbered_preview_comes_before_the_error(server: ComfyServer) -> None:
    """Which number would have been right is in the preview."""
    events: list[Event] = []
    with pytest.raises(NodeFailed) as caught:
        server.run(
            graph(22, align_choose="index", align_index=5),
            on_event=lambda kind, data: events.append((kind, data)),
        )
    assert (caught.value.node_id, caught.value.exception_type) == ("align", "FaceIndexError")
    kinds = [kind for kind, _ in events]
    (sent,) = [data for kind, data in events if kind == "executed" and data["node"] == "align"]
    assert kinds.index("execution_error") > events.index(("executed", sent))
    assert sent["display_node"] == "align"
    plain = server.run(graph(22)).outputs["portrait"]["images"][0]
    drawn = picture(server, sent["output"]["images"][0]).astype(int)
    assert np.abs(drawn - picture(server, plain)).max() > 30  # the box and its number


# --- missing files ---------------------------------------------------------------------------


def test_every_missing_file_is_told_before_anything_runs(server: ComfyServer) -> None:
    prompt = graph(23, adapter_file="gone-1.safetensors", models_pack="gone-2")
    prompt["clip"]["inputs"] = {"model": "ViT-H-14", "weights_file": "gone-3.safetensors"}
    prompt["load"] = {"class_type": "InfiniteIDLoadIdentity",
                      "inputs": {"file": "gone-4.safetensors"}}  # fmt: skip
    prompt["apply"]["inputs"]["identity"] = ["mix", 0]
    prompt["mix"] = {"class_type": "InfiniteIDMix",
                     "inputs": {"identity_a": ["encode", 0], "identity_b": ["load", 0],
                                "mode": "stack", "ratio": 0.5}}  # fmt: skip
    with pytest.raises(PromptRejected) as caught:
        server.queue(prompt)
    for name in ("gone-1.safetensors", "gone-2", "gone-3.safetensors", "gone-4.safetensors"):
        assert name in str(caught.value)
    for folder in ("infinite_id", "insightface", "clip_vision", "infinite_id_identities"):
        assert str(server.base / "models" / folder) in str(caught.value)


# --- wrong values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"adapter_file": 5},
        {"adapter_file": None},
        {"adapter_file": {}},
        {"adapter_file": [1, 2, 3]},
        {"models_pack": "x" * 5000},
        {"models_pack": "a\0b"},
        {"align_image": 3},
        {"align_face_analysis": "models"},
        {"align_choose": {}},
        {"align_padding": "nan"},
        {"encode_faces": {}},
        {"encode_clip_vision": {"__value__": ["portrait", 0]}},
        {"apply_model": None},
        {"apply_adapter": 5},
        {"apply_identity": "x"},
        {"apply_strength": "nan"},
        {"apply_mask": {"a": 1}},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_name(server: ComfyServer, wrong: dict[str, Any]) -> None:
    with pytest.raises((PromptRejected, NodeFailed)) as caught:
        server.run(graph(24, **wrong))
    if isinstance(caught.value, NodeFailed):
        assert hasattr(errors, caught.value.exception_type), caught.value
    else:
        assert "Exception when validating" not in str(caught.value)
