"""Files that are not there: all named before anything runs, with the folders that were searched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .executor import Executor, Prompt, load_kept

EMBEDDED = "microworld (embedded)"
NONE = "none (embedded)"


def loaders(**changes: Any) -> Prompt:
    """The pack's four loaders, each with an output below it."""
    given: dict[str, tuple[str, dict[str, Any]]] = {
        "adapter": ("InfiniteIDAdapterLoader", {"file": "gone-1.safetensors"}),
        "identity": ("InfiniteIDLoadIdentity", {"file": "gone-2.safetensors"}),
        "clip": ("InfiniteIDOpenClipLoader",
                 {"model": "ViT-H-14", "weights_file": "gone-3.safetensors"}),
        "models": ("InfiniteIDFaceModelLoader",
                   {"pack": "gone-4", "provider": "auto", "detector_size": 640}),
    }  # fmt: skip
    prompt: Prompt = {}
    for key, (kind, inputs) in given.items():
        known = {name: changes.get(f"{key}_{name}", value) for name, value in inputs.items()}
        prompt[key] = {"class_type": kind, "inputs": known}
        prompt[f"{key} out"] = {"class_type": "Kept", "inputs": {"source": [key, 0]}}
    return prompt


@pytest.fixture(scope="module")
def executor(pack: Any) -> Executor:
    load_kept()
    return Executor()


@pytest.fixture
def packs(comfy_base: Path) -> Iterator[Path]:
    """The folder of the face model packs; what a test puts there goes away."""
    folder = comfy_base / "models" / "insightface" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def said(refused: dict[str, Any], key: str) -> str:
    """What the user reads on a node, whichever of its inputs it stands at."""
    return "\n".join(error["details"] for error in refused[key]["errors"])


def test_all_missing_files_are_named_at_once(executor: Executor, comfy_base: Path) -> None:
    refused = executor.validate(loaders())
    assert set(refused) == {"adapter", "identity", "clip", "models"}
    for key, name, folder in (
        ("adapter", "gone-1.safetensors", "infinite_id"),
        ("identity", "gone-2.safetensors", "infinite_id_identities"),
        ("clip", "gone-3.safetensors", "clip_vision"),
        ("models", "gone-4", "insightface"),
    ):
        assert name in said(refused, key)
        assert str(comfy_base / "models" / folder) in said(refused, key)


def test_every_folder_that_was_searched_is_named(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    for kind in ("infinite_id", "infinite_id_identities", "clip_vision", "insightface"):
        paths, extensions = folder_paths.folder_names_and_paths[kind]
        more = ([*paths, str(tmp_path / kind)], extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, more)
    refused = executor.validate(loaders())
    for key, kind in (
        ("adapter", "infinite_id"),
        ("identity", "infinite_id_identities"),
        ("clip", "clip_vision"),
        ("models", "insightface"),
    ):
        for path in folder_paths.get_folder_paths(kind):
            assert str(Path(path)) in said(refused, key)


def test_what_is_there_or_embedded_is_not_refused(
    executor: Executor, pack: Any, comfy_base: Path, packs: Path
) -> None:
    shutil.copytree(pack.microworld.files.FACE_MODELS, packs / "mine")
    for folder, name in (("infinite_id", "here.safetensors"), ("clip_vision", "c.safetensors")):
        (comfy_base / "models" / folder).mkdir(exist_ok=True)
        (comfy_base / "models" / folder / name).touch()  # contents are for the node itself
    prompt = loaders(
        adapter_file="here.safetensors", clip_weights_file="c.safetensors", models_pack="mine"
    )
    assert set(executor.validate(prompt)) == {"identity"}
    prompt = loaders(
        adapter_file=EMBEDDED, clip_model=EMBEDDED, clip_weights_file=NONE, models_pack=EMBEDDED
    )
    assert set(executor.validate(prompt)) == {"identity"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["nested/nested/det.onnx", "nested/nested/rec.onnx"], "one folder too deep"),
        (["nested/det.onnx"], "holds det.onnx. Copy the whole pack"),
        (["nested.zip"], "not unpacked"),
        (["nested/readme.txt"], "was not found"),
    ],
)
def test_a_pack_that_is_not_as_it_should_be(
    executor: Executor, packs: Path, files: list[str], words: str
) -> None:
    for file in files:
        (packs / file).parent.mkdir(parents=True, exist_ok=True)
        (packs / file).touch()
    assert words in said(executor.validate(loaders(models_pack="nested")), "models")


def test_a_model_without_its_weights(executor: Executor) -> None:
    refused = executor.validate(loaders(clip_weights_file=NONE))
    assert "needs its weights" in said(refused, "clip")
    refused = executor.validate(loaders(clip_model="ViT-X-99"))
    assert "ViT-H-14" in said(refused, "clip")


@pytest.mark.parametrize(
    "name", [5, True, {}, {"__value__": [1, 2, 3]}, "", "../x", "a\0b", "x" * 100_000, "\ud800"]
)
def test_what_is_no_name_is_refused_before_anything_runs(executor: Executor, name: Any) -> None:
    prompt = loaders(
        adapter_file=name, identity_file=name, clip_weights_file=name, models_pack=name
    )
    refused = executor.validate(prompt)
    assert set(refused) == {"adapter", "identity", "clip", "models"}
    for node in refused.values():
        assert {error["type"] for error in node["errors"]} == {"custom_validation_failed"}
    assert len(json.dumps(refused)) < 50_000
