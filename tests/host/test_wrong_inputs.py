"""Whatever JSON a prompt holds for an input: the host refuses it, or the node does, by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from nodes import NODE_CLASS_MAPPINGS
from tools.node_ids import NODE_IDS

from .executor import Executor, Prompt, executed, failures, load_extra, load_kept
from .face_pose import load_made_instantid

EMBEDDED = "microworld (embedded)"

# By what a prompt's JSON can hold. Lists of two are links.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "number": 5,
    "negative": -(10**30),
    "NaN": math.nan,
    "infinity": math.inf,
    "NaN as a text": "nan",
    "text": "x",
    "empty text": "",
    "long text": "x" * 5000,
    "NUL": "a\0b",
    "half a letter": "\ud800",
    "object": {},
    "object of objects": {"a": {"b": [1]}},
    "empty list": [],
    "list": [1, 2, 3],
    "wrapped list": {"__value__": [1, 2, 3]},
    "wrapped null": {"__value__": None},
    "wrapped object": {"__value__": {"samples": 1}},
    "link to nobody": ["nobody", 0],
    "link to no output": ["latent", 7],
    "link of another type": ["micro", 2],  # a VAE, which none of our nodes takes
    "wrapped link of another type": {"__value__": ["micro", 2]},
}
# The host's words for what it refuses itself, and for what our loaders do.
REFUSALS = {
    "bad_linked_input",
    "custom_validation_failed",
    "invalid_input_type",
    "return_type_mismatch",
    "value_bigger_than_max",
    "value_not_in_list",
    "value_smaller_than_min",
}
# The embedded model needs no file: any name will do. See test_missing_files.py.
UNREAD = {("clip", "weights_file")}
# What the host makes a text, a truth or a number of is what the user gets.
CONVERTED = {"STRING", "BOOLEAN", "INT", "FLOAT"}


def base() -> Prompt:
    """Every node of the pack, each input filled as it should be; one output below each."""
    portrait, faces = ["portrait", 0], ["align", 0]
    prompt: dict[str, tuple[str, dict[str, Any]]] = {
        "micro": ("InfiniteIDMicroModel", {}),
        "portrait": ("InfiniteIDMicroPortrait", {"person": 0, "size": 256}),
        "models": ("InfiniteIDFaceModelLoader",
                   {"pack": EMBEDDED, "provider": "CPU", "detector_size": 640}),
        "clip": ("InfiniteIDOpenClipLoader",
                 {"model": EMBEDDED, "weights_file": "none (embedded)"}),
        "adapter": ("InfiniteIDAdapterLoader", {"file": EMBEDDED}),
        "align": ("InfiniteIDAlignFace",
                  {"face_analysis": ["models", 0], "image": portrait, "choose": "largest",
                   "index": 0, "order": "left to right", "padding": 0.25, "if_no_face": "error"}),
        "encode": ("InfiniteIDEncode",
                   {"faces": faces, "clip_vision": ["clip", 0], "combine": "stack",
                    "weights": "", "clip_layer": "last", "embedding": "normed",
                    "adapter": ["adapter", 0]}),
        "kit": ("InfiniteIDLoader",
                {"adapter": EMBEDDED, "image_encoder": "auto", "face_models": "auto",
                 "reads": "auto", "lora": "all rows", "lora_strength": 1.0,
                 "pulid_mode": "auto"}),
        "person": ("InfiniteIDPerson",
                   {"model": ["micro", 0], "infinite_id": ["kit", 0], "photos": portrait,
                    "strength": 1.0, "preset": "balanced", "start_percent": 0.0,
                    "end_percent": 1.0, "mask": ["mask", 0]}),
        "mix": ("InfiniteIDMix", {"identity_a": ["encode", 0], "identity_b": ["encode", 0],
                                  "mode": "stack", "ratio": 0.5}),
        "save": ("InfiniteIDSaveIdentity",
                 {"identity": ["encode", 0], "name": "wrong inputs", "if_exists": "overwrite"}),
        "load": ("InfiniteIDLoadIdentity", {"file": "there.safetensors"}),
        "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "mask": ("SolidMask", {"value": 1.0, "width": 128, "height": 128}),
        "apply": ("InfiniteIDApply",
                  {"model": ["micro", 0], "adapter": ["adapter", 0], "identity": ["encode", 0],
                   "strength": 1.0, "mixing": "mixed", "style": "adain_mean",
                   "style_strength": 1.0, "merge_text": True, "text_stream": "own",
                   "start_percent": 0.0, "end_percent": 1.0, "mask": ["mask", 0]}),
        "words": ("CLIPTextEncode", {"clip": ["micro", 1], "text": "a person"}),
        "instantid": ("MadeInstantID", {"photo": portrait}),
        "pose": ("InfiniteIDFacePose",
                 {"positive": ["words", 0], "negative": ["words", 0],
                  "control_net": ["instantid", 2], "infinite_id": ["instantid", 0],
                  "identity": ["instantid", 1], "pose": portrait, "latent": ["latent", 0],
                  "strength": 0.8, "start_percent": 0.0, "end_percent": 1.0}),
        "crop": ("InfiniteIDFaceCrop",
                 {"face_analysis": ["models", 0], "image": portrait, "choose": "largest",
                  "index": 0, "order": "left to right", "padding": 0.5, "size": 128,
                  "if_no_face": "error"}),
        "paste": ("InfiniteIDFacePaste", {"image": portrait, "crop": ["crop", 0],
                                          "region": ["crop", 1], "feather": 0.15}),
        "style": ("InfiniteIDStylePreset",
                  {"prompt": "a person", "negative": "", "style": "anime",
                   "presets": "anime = anime of {prompt} | photo"}),
        "score": ("InfiniteIDScore",
                  {"images": portrait, "face_analysis": ["models", 0], "identity": ["encode", 0],
                   "reference": portrait, "clip_vision": ["clip", 0], "prompt": "a person"}),
    }  # fmt: skip
    nodes = {key: {"class_type": kind, "inputs": given} for key, (kind, given) in prompt.items()}
    sinks = {f"{key} out": {"class_type": "Kept", "inputs": {"source": [key, 0]}} for key in prompt}
    return {**nodes, **sinks}


@pytest.fixture(scope="module")
def executor(pack: Any) -> Executor:
    """One whose cache holds the result of every node."""
    load_extra("mask")
    load_kept()
    load_made_instantid(pack)
    made = Executor()
    first = base()
    first["save"]["inputs"]["name"] = "there"
    assert not failures(made.run(first, ["save"]))
    assert made.validate(base()) == {}
    assert not failures(made.run(base(), [key for key in base() if key.endswith(" out")]))
    return made


def inputs() -> list[tuple[str, str]]:
    """Each node by its name in ``base``, with each of its inputs."""
    ours = {key: node for key, node in base().items() if node["class_type"] in NODE_IDS}
    return [(key, name) for key, node in ours.items() for name in node["inputs"]]


def schema(key: str) -> dict[str, Any]:
    """The inputs of a node of ``base`` by their ids."""
    node = NODE_CLASS_MAPPINGS[base()[key]["class_type"]]
    return {described.id: described for described in node.define_schema().inputs}


def test_every_input_of_every_node_is_tried(pack: Any) -> None:
    ours = {node["class_type"]: key for key, node in base().items()}
    assert {(ours[kind], name) for kind in NODE_IDS for name in schema(ours[kind])} == set(inputs())


@pytest.mark.parametrize(("key", "name"), inputs())
def test_a_wrong_value_is_refused_by_name(
    key: str, name: str, executor: Executor, pack: Any
) -> None:
    ours, described = vars(pack.infinite_id_core.errors), schema(key)[name]
    problems = []
    for title, value in VALUES.items():
        prompt = base()
        prompt[key]["inputs"][name] = copy.deepcopy(value)
        refused = executor.validate(prompt, [f"{key} out"])
        if refused:
            # The host's own code stumbles over a link that leads nowhere.
            said = [error for node in refused.values() for error in node["errors"]]
            if not ({error["type"] for error in said} <= REFUSALS or title.startswith("link")):
                problems.append((title, said))
            continue
        events = executor.run(prompt, [f"{key} out"])
        for failed in failures(events):
            error = failed["exception_type"].rpartition(".")[2]
            if error not in ours or len(failed["exception_message"]) > 6000:
                problems.append((title, failed))
        taken = key in executed(events) and not failures(events)
        given = prompt[key]["inputs"][name]
        right = (given is None and described.optional) or described.get_io_type() in CONVERTED
        right = right or ((key, name) in UNREAD and isinstance(given, str))
        if taken and not right:
            problems.append((title, "taken"))
    assert problems == []
