"""A file replaced under its name is read again at the next run; one that is as it was is not."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nodes import NODE_CLASS_MAPPINGS

from .executor import Executor, Kept, Prompt, executed, failures, load_kept

EMBEDDED = "microworld (embedded)"
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapter": ("InfiniteIDAdapterLoader", {"file": "own.safetensors"}),
    "identity": ("InfiniteIDLoadIdentity", {"file": "own.safetensors"}),
    "clip": ("InfiniteIDOpenClipLoader",
             {"model": "ViT-H-14", "weights_file": "own.safetensors"}),
    "models": ("InfiniteIDFaceModelLoader",
               {"pack": "own", "provider": "CPU", "detector_size": 640}),
}  # fmt: skip


def prompt_of(key: str) -> Prompt:
    kind, inputs = LOADERS[key]
    return {
        key: {"class_type": kind, "inputs": dict(inputs)},
        "out": {"class_type": "Kept", "inputs": {"source": [key, 0]}},
    }


@pytest.fixture(scope="module")
def executor(pack: Any) -> Executor:
    load_kept()
    return Executor()


@pytest.fixture
def files(pack: Any, comfy_base: Path) -> Iterator[dict[str, Path]]:
    """A sound file of each kind; of the pack, its recogniser."""
    models, weights = comfy_base / "models", pack.microworld.files
    places = {
        "adapter": models / "infinite_id" / "own.safetensors",
        "identity": models / "infinite_id_identities" / "own.safetensors",
        "clip": models / "clip_vision" / "own.safetensors",
        "models": models / "insightface" / "models" / "own" / weights.RECOGNISER.name,
    }
    for path in places.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(weights.ADAPTER, places["adapter"])
    shutil.copytree(weights.FACE_MODELS, places["models"].parent, dirs_exist_ok=True)
    places["clip"].write_bytes(bytes(1000))  # what is read of it is the core's matter
    places["identity"].write_bytes(bytes(1000))
    yield places
    shutil.rmtree(places.pop("models").parent)
    for path in places.values():
        path.unlink(missing_ok=True)


def replace_in_place(path: Path) -> None:
    """The same size and time of writing: another file within one tick of a coarse clock."""
    old, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def replace_whole(path: Path) -> None:
    """By a rename, as the trainer writes, with a later time of writing."""
    other = path.with_suffix(".new")
    shutil.copy(path, other)
    os.utime(other, ns=(0, path.stat().st_mtime_ns + 10**9))
    other.replace(path)


@pytest.mark.parametrize("replace", [replace_in_place, replace_whole])
@pytest.mark.parametrize("key", LOADERS)
def test_a_replaced_file_has_another_fingerprint(
    pack: Any, files: dict[str, Path], key: str, replace: Callable[[Path], None]
) -> None:
    kind, inputs = LOADERS[key]
    fingerprint = NODE_CLASS_MAPPINGS[kind].fingerprint_inputs
    first = fingerprint(**inputs)
    assert fingerprint(**inputs) == first
    replace(files[key])
    assert fingerprint(**inputs) != first


@pytest.mark.parametrize("key", ["adapter", "models"])
def test_the_node_runs_again_where_its_file_was_replaced(
    executor: Executor, files: dict[str, Path], key: str
) -> None:
    assert key in executed(executor.run(prompt_of(key), ["out"]))
    assert executed(executor.run(prompt_of(key), ["out"])) == set()
    replace_whole(files[key])
    again = executor.run(prompt_of(key), ["out"])
    assert key in executed(again) and not failures(again)
    assert executed(executor.run(prompt_of(key), ["out"])) == set()


def test_the_run_after_a_training_paints_with_the_new_weights(
    pack: Any, executor: Executor, files: dict[str, Path]
) -> None:
    """The trainer writes every adapter under one name."""
    core = pack.infinite_id_core.files

    def bias() -> float:
        assert not failures(executor.run(prompt_of("adapter"), ["out"]))
        return float(Kept.last.adapter.face_mapper.norm.bias[0])

    before = bias()
    trained = core.adapters.read_adapter(files["adapter"])
    trained.face_mapper.norm.bias.data += 1.0
    core.infinite_id_format.write_adapter(files["adapter"], trained)
    assert bias() == pytest.approx(before + 1.0, abs=1e-2)


def test_a_file_in_the_pack_that_is_new_or_gone(pack: Any, files: dict[str, Path]) -> None:
    kind, inputs = LOADERS["models"]
    fingerprint = NODE_CLASS_MAPPINGS[kind].fingerprint_inputs
    marks = [fingerprint(**inputs)]
    more = files["models"].with_name("more.onnx")
    shutil.copy(files["models"], more)
    marks.append(fingerprint(**inputs))
    files["models"].unlink()
    marks.append(fingerprint(**inputs))
    assert len(set(marks)) == 3


@pytest.mark.parametrize("key", LOADERS)
def test_a_fingerprint_never_fails(pack: Any, files: dict[str, Path], key: str) -> None:
    """What is wrong is for the node to say; a fingerprint that fails is only a line in the log."""
    kind, inputs = LOADERS[key]
    node = NODE_CLASS_MAPPINGS[kind]
    first = node.fingerprint_inputs(**inputs)
    files[key].unlink()
    assert node.fingerprint_inputs(**inputs) != first
    name = {"clip": "weights_file", "models": "pack"}.get(key, "file")
    for wrong in (5, {}, [1, 2, 3], "", "../x", "a\0b", "x" * 5000, "\ud800"):
        assert isinstance(node.fingerprint_inputs(**{**inputs, name: wrong}), str)
    # A link brings the name later: nothing is known of the file, so it is read at every run.
    assert math.isnan(node.fingerprint_inputs(**{**inputs, name: None}))


@pytest.mark.parametrize(
    ("key", "name"), [("adapter", "file"), ("clip", "model"), ("models", "pack")]
)
def test_the_embedded_choices_need_no_file(pack: Any, key: str, name: str) -> None:
    kind, inputs = LOADERS[key]
    node = NODE_CLASS_MAPPINGS[kind]
    chosen = {**inputs, name: EMBEDDED}
    assert node.fingerprint_inputs(**chosen) == node.fingerprint_inputs(**chosen)
    assert node.fingerprint_inputs(**chosen) == EMBEDDED
