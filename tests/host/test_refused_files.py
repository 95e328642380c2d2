"""Bad files through the loader nodes: the core's own error, and a model nothing has touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sample
import pytest
import torch

import nodes as host_nodes

from ..core import hostile_files
from .tiny_sdxl import conditioning, latent, tiny_adapter, tiny_identity, tiny_model

FOLDERS = {"adapter": "infinite_id", "identity": "infinite_id_identities"}
LOADERS = {"adapter": "InfiniteIDAdapterLoader", "identity": "InfiniteIDLoadIdentity"}
INPUTS = {"adapter": "adapter", "identity": "identity", "features": "identity"}
APPLY = {
    "strength": 1.0,
    "mixing": "mixed",
    "style": "adain_mean",
    "style_strength": 1.0,
    "merge_text": True,
    "text_stream": "own",
    "start_percent": 0.0,
    "end_percent": 1.0,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def errors(pack: Any) -> Any:
    return pack.infinite_id_core.errors


@pytest.fixture(scope="module")
def files(pack: Any) -> Any:
    return pack.infinite_id_core.files


@pytest.fixture(scope="module")
def good(pack: Any, model: Any) -> dict[str, Any]:
    return {"adapter": tiny_adapter(pack, model), "identity": tiny_identity(pack, references=2)}


@pytest.fixture
def place(comfy_base: Path) -> Iterator[Any]:
    """Puts bytes into a model folder under a name; what it put there goes away."""
    placed: list[Path] = []

    def put(kind: str, name: str = "file.safetensors", data: bytes = b"") -> Path:
        path = comfy_base / "models" / FOLDERS[kind] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        placed.append(path)
        return path

    yield put
    for path in placed:
        path.unlink()


def node(name: str) -> Any:
    return host_nodes.NODE_CLASS_MAPPINGS[name]


def load(kind: str, file: str = "file.safetensors") -> Any:
    return node(LOADERS[kind]).execute(file=file).result[0]


def apply(model: Any, adapter: Any, identity: Any) -> Any:
    return node("InfiniteIDApply").execute(model, adapter, identity, **APPLY).result[0]


def state(model: Any) -> dict[str, Any]:
    """Everything of a model patcher that a patch could change."""
    return {
        "weights": {k: v.clone() for k, v in model.model.state_dict().items()},
        "options": copy.deepcopy(model.model_options),
        "own": [
            dict(getattr(model, name))
            for name in (
                "patches", "object_patches", "wrappers", "callbacks", "attachments",
                "additional_models", "injections", "hook_patches",
            )
        ],
        "forwards": [m.__dict__.get("forward") for m in model.model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()],
    }  # fmt: skip


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    same = [torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"]]
    return all(same) and all(a[k] == b[k] for k in ("options", "own", "forwards", "hooks"))


def sample(model: Any) -> torch.Tensor:
    noise = latent(1, 8)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 2, 4.0, "euler", "normal", conditioning(1), conditioning(2),
            torch.zeros_like(noise), seed=11, disable_pbar=True,
        )  # fmt: skip


# --- bad files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before(model: Any, pack: Any) -> Iterator[dict[str, Any]]:
    """The model before all refusals; after the last it must paint the same picture."""
    kept, picture = state(model), sample(model)
    yield kept
    assert torch.equal(sample(model), picture)


@pytest.mark.parametrize(("kind", "name"), hostile_files.CASES)
def test_the_nodes_refuse_bad_files(
    kind: str,
    name: str,
    errors: Any,
    place: Any,
    model: Any,
    before: Any,
    good: Any,
    tmp_path: Path,
) -> None:
    harm = tmp_path / "harm"
    path = place(INPUTS[kind], data=hostile_files.build(kind, name, harm))
    with pytest.raises(errors.FileError) as caught:
        # As a workflow has it: what the loader gives goes into Apply.
        apply(model, **{**good, INPUTS[kind]: load(INPUTS[kind])})
    assert type(caught.value).__name__ == hostile_files.THREATS[name].error
    assert str(caught.value).startswith(f"{path}: ")
    assert not harm.exists()
    assert path.read_bytes()[:16] == hostile_files.build(kind, name, harm)[:16]
    assert equal(state(model), before)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize(
    ("file", "error"),
    [
        ("none.safetensors", "FileMissingError"),
        ("", "NameNotAllowedError"),
        ("../file.safetensors", "NameNotAllowedError"),
        ("..\\file.safetensors", "NameNotAllowedError"),
        ("a/../../file.safetensors", "NameNotAllowedError"),
        ("/etc/passwd", "NameNotAllowedError"),
        ("\\\\server\\share\\x.safetensors", "NameNotAllowedError"),
        ("C:\\x.safetensors", "NameNotAllowedError"),
        ("~/x.safetensors", "NameNotAllowedError"),
        ("a\0b", "FileMissingError"),
        ("x" * 300, "FileMissingError"),
    ],
)
def test_the_nodes_look_into_their_folders_only(
    kind: str, file: str, error: str, errors: Any, pack: Any
) -> None:
    with pytest.raises(getattr(errors, error)) as caught:
        load(kind, file)
    if error == "FileMissingError":  # says where it looked
        assert str(Path("models") / FOLDERS[kind]) in str(caught.value)


# --- sound files that do not belong together -------------------------------------------------


def test_an_adapter_of_another_unet(
    pack: Any, errors: Any, place: Any, files: Any, model: Any, good: Any
) -> None:
    path, kept = place("adapter"), state(model)
    files.infinite_id_format.write_adapter(path, good["adapter"].adapter)
    other = tiny_model(transformer_depth=[0, 0, 1, 1, 3, 3])
    unpatched = state(other)
    with pytest.raises(errors.ModelMismatchError, match="another UNet"):
        apply(other, load("adapter"), good["identity"])
    path.write_bytes(hostile_files.adapter().bytes())  # sound, of two layers
    with pytest.raises(errors.ModelMismatchError, match="it has 2 layers"):
        apply(model, load("adapter"), good["identity"])
    assert equal(state(other), unpatched) and equal(state(model), kept)


def test_an_identity_of_another_encoder(errors: Any, place: Any, model: Any, good: Any) -> None:
    place("identity", data=hostile_files.identity().bytes())
    kept = state(model)
    with pytest.raises(errors.IdentityMismatchError, match="'tiny'.*'made/reader'"):
        apply(model, good["adapter"], load("identity"))
    assert equal(state(model), kept)


# --- good files ------------------------------------------------------------------------------


def test_good_files_paint_what_they_were_written_from(
    files: Any, place: Any, model: Any, good: Any
) -> None:
    files.infinite_id_format.write_adapter(
        place("adapter", "sub/good.safetensors"), good["adapter"].adapter
    )
    files.identities.write_identity(place("identity", "Änne 安娜.safetensors"), good["identity"])
    adapter = load("adapter", "sub/good.safetensors")
    identity = load("identity", "Änne 安娜.safetensors")
    assert adapter.adapter.config == good["adapter"].adapter.config
    assert torch.equal(identity["clip"].value, good["identity"]["clip"].value)
    kept, plain = state(model), sample(model)
    found = sample(apply(model, adapter, identity))
    written = sample(apply(model, good["adapter"], good["identity"]))
    # Not bit for bit: tensors in a file lie at other addresses, and sums add up in another order.
    assert float((found - written).norm() / written.norm()) < 1e-5
    assert float((found - plain).norm() / plain.norm()) > 0.01
    assert equal(state(model), kept)


def test_a_refused_file_leaves_the_last_good_one_usable(
    errors: Any, files: Any, place: Any, model: Any, good: Any
) -> None:
    """The file is replaced by a bad one while its first contents are in use."""
    path = place("identity")
    files.identities.write_identity(path, good["identity"])
    identity = load("identity")
    mark = node("InfiniteIDLoadIdentity").fingerprint_inputs("file.safetensors")
    picture = sample(apply(model, good["adapter"], identity))
    path.write_bytes(b"\0" * path.stat().st_size)
    assert node("InfiniteIDLoadIdentity").fingerprint_inputs("file.safetensors") != mark
    with pytest.raises(errors.HeaderError):
        load("identity")
    assert torch.equal(sample(apply(model, good["adapter"], identity)), picture)
