"""Files that are no published adapter for SDXL, or a damaged one: each by its own message."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from infinite_id_core import errors
from infinite_id_core.files import adapters
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.files.safetensors_file import SafetensorsFile
from infinite_id_core.files.stored_tensor import StoredTensor
from infinite_id_core.sdxl import layers as core_layers

from .. import published_files as files
from ..hostile_files import Harm
from ..published_files import SMALL, TRUE

LAYERS = files.layers_of(SMALL, core_layers)
ONE = torch.ones(1)


def of(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(1) for name in names}


def storymaker() -> Any:
    projector = files.filled(files.plus_v2(SMALL), 1)
    projector |= {f"resample.{n}": t for n, t in files.filled(files.plus(SMALL), 2).items()}
    more = {"pos_embed": (3, 9, 32), "bg_embed": (1, 9, 32), **files._linear("proj_out", 32, 32)}
    return {
        "image_proj_model": {**projector, **files.filled(more, 3)},
        "ip_adapter": files.made("plus v2")["ip_adapter"],
    }


def kolors_faceid() -> Any:
    made = files.made("plus v2")
    made["image_proj"]["perceiver_resampler.proj_in.weight"] = torch.ones(4096, 1024)
    return {"image_proj": made["image_proj"], "adapter_modules": made["ip_adapter"]}


def kolors_plus() -> Any:
    made = files.made("plus")
    made["image_proj"]["latents"] = torch.ones(1, 16, 2048)
    made["image_proj"]["proj_in.weight"] = torch.ones(2048, 1024)
    return made


def sd15(context: int = 768) -> Any:
    keys = {
        f"{n}.to_{part}_ip.weight": torch.ones(320, context)
        for n in range(1, 33, 2)
        for part in "kv"
    }
    return {"image_proj": {"proj.weight": torch.ones(3072, 1024)}, "ip_adapter": keys}


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "PuLID for FLUX": (
        lambda: of("pulid_encoder.latents", "pulid_ca.0.norm1.weight"), "is PuLID for FLUX",
        "authors' own nodes",
    ),
    "IP-Adapter for FLUX": (
        lambda: of("ip_adapter_proj_model.norm.bias", "double_blocks.0.processor.x"),
        "is an IP-Adapter for FLUX", "expected an adapter for SDXL",
    ),
    "PhotoMaker v1": (
        lambda: {"id_encoder": of("vision_model.x"), "lora_weights": of("unet.a.down")},
        "is PhotoMaker v1", "Use ComfyUI's own PhotoMaker nodes",
    ),
    "PhotoMaker v2": (
        lambda: {"id_encoder": of("qformer_perceiver.token_proj.0.weight"),
                 "lora_weights": of("unet.a.down")},
        "is PhotoMaker v2", "ComfyUI's own PhotoMaker nodes read v1 only",
    ),
    "the LoRA half": (
        lambda: of("lora_unet_down_blocks_1_to_k.lora_down.weight", "lora_unet_x.alpha"),
        "LoRA half of a FaceID file", "FaceID's .bin file holds its LoRA too",
    ),
    "IdentityNet": (
        lambda: of("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.x"),
        "IdentityNet", "Load it with a ControlNet loader",
    ),
    "CLIP": (
        lambda: of("vision_model.embeddings.class_embedding", "visual_projection.weight"),
        "is a CLIP image encoder", "models/clip_vision",
    ),
    "open_clip": (
        lambda: of("visual.class_embedding", "logit_scale"), "is a CLIP image encoder",
        "models/clip_vision",
    ),
    "a UNet": (
        lambda: of("down_blocks.0.x", "mid_block.y"), "is a UNet or a whole checkpoint",
        "checkpoint",
    ),
    "a training checkpoint's UNet": (
        lambda: of("unet.conv_in.weight", "unet.mid_block.x"), "is a UNet or a whole checkpoint",
        "without an adapter",
    ),
    "a checkpoint": (
        lambda: of("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"),
        "is a UNet or a whole checkpoint", "checkpoint",
    ),
    "a text encoder": (lambda: of("text_model.x"), "is a text encoder", "models/text_encoders"),
    "StoryMaker": (storymaker, "is StoryMaker", "mask of each person"),
    "Kolors FaceID": (kolors_faceid, "is IP-Adapter FaceID plus for Kolors", "text encoder"),
    "Kolors plus": (kolors_plus, "is IP-Adapter plus for Kolors", "text encoder"),
    "SD 1.5": (sd15, "is an adapter for Stable Diffusion 1.5: 16", "70 layers"),
    "SD 2": (lambda: sd15(1024), "is an adapter for Stable Diffusion 2: 16", "70 layers"),
    "K/V alone": (
        lambda: {"ip_adapter": files.made("plus")["ip_adapter"]}, "has keys and values and no",
        "half of an adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_known_and_of_no_use_is_refused_by_name(name, kind, tmp_path):
    make, what, advice = REFUSED[name]
    path, values = tmp_path / "ip-adapter-plus-face_sdxl.safetensors", make()
    if kind == "pickle":
        torch.save(values, path)
    else:
        nested = {g: v for g, v in values.items() if isinstance(v, dict)}
        save_file(files.flat(**nested) if nested else values, path)
    with pytest.raises(errors.OtherFamilyError) as caught:
        adapters.read_adapter(path)
    assert what in caught.value.problem and advice in caught.value.problem
    assert "expected" in caught.value.problem.lower()


def test_a_foreign_file_is_of_no_known_family(tmp_path):
    save_file(of("something.weight"), tmp_path / "a.safetensors")
    with pytest.raises(errors.WrongFormatError, match="PuLID v1.1.*IP-Adapter") as caught:
        adapters.read_adapter(tmp_path / "a.safetensors")
    assert type(caught.value) is errors.WrongFormatError
    torch.save({"clip_mapper.norm.bias": ONE}, tmp_path / "b.bin")
    with pytest.raises(errors.WrongFormatError, match="trainer convert"):
        adapters.read_adapter(tmp_path / "b.bin")
    save_file(of("image_proj.new.weight", "ip_adapter.1.to_k_ip.weight"), tmp_path / "c")
    with pytest.raises(errors.WrongFormatError, match=r"image_proj\.new"):
        adapters.read_adapter(tmp_path / "c")


# --- layers ----------------------------------------------------------------------------------


def bad(tmp_path: Path, change: Callable[[files.Nested], Any], family: str = "faceid") -> Path:
    made = files.made(family)
    change(made)
    path = tmp_path / "a.bin"
    torch.save(made, path)
    return path


def read(path: Path) -> Any:
    return adapters.read_adapter(path, options=AdapterOptions(layers=LAYERS))


def test_missing_layers_are_listed(tmp_path):
    def drop(made: files.Nested) -> None:
        for name in ("3.to_k_ip.weight", "7.to_v_ip.weight"):
            del made["ip_adapter"][name]

    with pytest.raises(errors.MissingTensorError, match="lacks K/V of 2 of the UNet's 4") as caught:
        read(bad(tmp_path, drop))
    assert "3 (up_blocks.0.attentions.0.transformer_blocks.0)" in caught.value.problem
    assert "7 (mid_block.attentions.0.transformer_blocks.0)" in caught.value.problem


def test_sixty_of_seventy_layers_are_not_enough(tmp_path):
    """As a file without the middle block would be."""
    shapes = {n: s for n, s in files.key_values(TRUE).items() if int(n.split(".")[0]) < 121}
    tensors = {n: torch.empty(s, dtype=torch.float16) for n, s in shapes.items()}
    entries = {"image_proj": files.filled(files.faceid(TRUE), 1), "ip_adapter": tensors}
    path = tmp_path / "a.safetensors"
    save_file(files.flat(**entries), path)
    with pytest.raises(errors.MissingTensorError, match="lacks K/V of 10 of the UNet's 70.*121 "):
        adapters.read_adapter(path)


def test_dropped_key_values_are_explained(tmp_path):
    """The usual end of a conversion that leaves unet.* behind."""
    with pytest.raises(errors.MissingTensorError, match=r"drops unet\.\* loses them"):
        adapters.read_adapter(bad(tmp_path, lambda made: made.pop("ip_adapter")))


def test_another_unets_layers_are_not_sdxls(tmp_path):
    path = files.write(tmp_path / "a", "nested pickle", files.made("plus"))
    with pytest.raises(errors.MissingTensorError, match="lacks K/V of 66 of the UNet's 70"):
        adapters.read_adapter(path)


def _set(group: str, name: str, tensor: torch.Tensor) -> Callable[[files.Nested], None]:
    return lambda made: made[group].update({name: tensor})


def _drop(group: str, name: str) -> Callable[[files.Nested], Any]:
    return lambda made: made[group].pop(name)


def _twice(made: files.Nested) -> None:
    made["ip_adapter"]["1.id_to_k.weight"] = made["ip_adapter"]["1.to_k_ip.weight"]


BAD: dict[str, tuple[str, Callable[[files.Nested], Any], str, str]] = {
    # name -> family, change, error, part of its message
    "K of another context": (
        "plus", _set("ip_adapter", "1.to_k_ip.weight", torch.ones(64, 33)), "WrongShapeError",
        r"1\.to_k_ip\.weight has shape \[64, 33\]; expected \[64, 32\]",
    ),
    "K too narrow": (
        "plus", _set("ip_adapter", "5.to_v_ip.weight", torch.ones(64, 32)), "WrongShapeError",
        r"expected \[32, 32\]",
    ),
    "K is a number": (
        "plus", _set("ip_adapter", "1.to_k_ip.weight", torch.tensor(1.0)), "WrongShapeError",
        r"has shape \[\]",
    ),
    "a layer of no UNet": (
        "plus", _set("ip_adapter", "9.to_k_ip.weight", torch.ones(64, 32)),
        "UnexpectedTensorError", r"9\.to_k_ip",
    ),
    "K/V of self-attention": (
        "plus", _set("ip_adapter", "2.to_k_ip.weight", torch.ones(64, 32)),
        "UnexpectedTensorError", r"2\.to_k_ip",
    ),
    "a number too long": (
        "plus", _set("ip_adapter", "9" * 500 + ".to_k_ip.weight", ONE), "UnexpectedTensorError",
        "99999",
    ),
    "a layer in Arabic digits": (
        "plus", _set("ip_adapter", "\u0661.to_k_ip.weight", ONE), "UnexpectedTensorError", "to_k",
    ),
    "K twice": ("plus", _twice, "UnexpectedTensorError", "a second one of the same"),
    "an extra in the K/V": (
        "plus", _set("ip_adapter", "1.gate", ONE), "UnexpectedTensorError", r"1\.gate",
    ),
    "half a LoRA": (
        "faceid", _drop("ip_adapter", "6.to_out_lora.up.weight"), "MissingTensorError",
        "LoRA that lacks 1 of its 64",
    ),
    "a LoRA of two ranks": (
        "faceid", _set("ip_adapter", "6.to_out_lora.up.weight", torch.ones(64, 5)),
        "WrongShapeError", r"expected \[64, 4\]",
    ),
    "a LoRA of rank 0": (
        "faceid", lambda made: made["ip_adapter"].update({
            "0.to_q_lora.down.weight": torch.ones(0, 64),
            "0.to_q_lora.up.weight": torch.ones(64, 0)}), "WrongShapeError", "rank 0",
    ),
    "a position embedding": (
        "plus", _set("image_proj", "pos_emb.weight", torch.ones(257, 48)),
        "UnexpectedTensorError", r"image_proj\.pos_emb\.weight",
    ),
    "latents of a mean": (
        "raw face", _set("image_proj", "to_latents_from_mean_pooled_seq.0.weight", ONE),
        "UnexpectedTensorError", "to_latents_from_mean_pooled_seq",
    ),
    "latents flat": (
        "plus", _set("image_proj", "latents", torch.ones(5, 48)), "WrongShapeError",
        "expected 3 dimensions",
    ),
    "no latents at all": (
        "plus", _set("image_proj", "latents", torch.ones(1, 0, 48)), "WrongShapeError",
        "dimensions of 1",
    ),
    "a norm missing": (
        "plus", _drop("image_proj", "norm_out.bias"), "MissingTensorError",
        r"image_proj\.norm_out\.bias",
    ),
    "a layer's norm too wide": (
        "plus", _set("image_proj", "layers.3.1.0.bias", torch.ones(49)), "WrongShapeError",
        r"layers\.3\.1\.0\.bias has shape \[49\]; expected \[48\]",
    ),
    "heads that are not 64 wide": (
        "plus", _set("image_proj", "layers.0.0.to_q.weight", torch.ones(100, 48)),
        "WrongShapeError", "expected a multiple of 64",
    ),
    "a layer left out": (
        "plus", lambda made: [made["image_proj"].pop(n) for n in list(made["image_proj"])
                              if n.startswith("layers.1.")], "MissingTensorError", r"layers\.1\.",
    ),
    "a hundred layers": (
        "plus", lambda made: made["image_proj"].update(
            {f"layers.{i}.0.norm1.bias": torch.ones(48) for i in range(100)}),
        "UnexpectedTensorError", "has 100 layers",
    ),
    "an encoder of no known width": (
        "plus", _set("image_proj", "proj_in.weight", torch.ones(48, 768)), "WrongShapeError",
        r"reads an image encoder 768 wide; expected 1280 \(ViT-H-14\), 1664 \(ViT-bigG-14\)",
    ),
    "tokens that are no whole number": (
        "faceid", _set("image_proj", "proj.2.weight", torch.ones(100, 1024)), "WrongShapeError",
        "expected a multiple of 32",
    ),
    "a perceiver of another width": (
        "plus v2", _set("image_proj", "perceiver_resampler.proj_in.weight", torch.ones(48, 1280)),
        "WrongShapeError", "perceiver_resampler",
    ),
    "an encoder that reads the face alone": (
        "pulid v1", _set("image_proj", "body.0.weight", torch.ones(24, 512)), "WrongShapeError",
        "expected more than the 512",
    ),
    "a former of nine layers": (
        "pulid v1.1", lambda made: [made["image_proj"].pop(n) for n in list(made["image_proj"])
                                    if n.startswith("layers.9.")], "WrongShapeError",
        "has 9 perceiver layers",
    ),
    "a level missing": (
        "pulid v1.1", lambda made: [made["image_proj"].pop(n) for n in list(made["image_proj"])
                                    if n.startswith("mapping_4.")], "MissingTensorError",
        r"mapping_4\.",
    ),
    "whole numbers": (
        "plus", _set("image_proj", "norm_out.bias", torch.ones(32, dtype=torch.int64)),
        "WrongDtypeError", "is I64",
    ),
    "eight bits": (
        "plus", lambda made: made["ip_adapter"].update({"1.to_k_ip.weight": torch.ones(64, 32).to(
            torch.float8_e4m3fn)}), "WrongDtypeError", "F8_E4M3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("container", ["pickle", "safetensors"])
@pytest.mark.parametrize("name", BAD)
def test_a_wrong_tensor_is_named_before_any_is_read(name, container, tmp_path, monkeypatch):
    family, change, error, message = BAD[name]
    path = bad(tmp_path, change, family)
    if container == "safetensors":
        made = torch.load(path, weights_only=True)
        save_file({n: t.clone() for n, t in files.flat(**made).items()}, path)

    def no(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsFile, "tensor", no)
    monkeypatch.setattr(StoredTensor, "read", no)
    with pytest.raises(errors.FileError, match=message) as caught:
        read(path)
    assert type(caught.value).__name__ == error
    assert len(str(caught.value)) < len(str(path)) + 4100


@pytest.mark.parametrize("container", ["nested pickle", "flat safetensors", "training pickle"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(number, container, tmp_path):
    made = files.made("faceid")
    for group, name in (("image_proj", "proj.2.bias"), ("ip_adapter", "3.to_v_ip.weight"),
                        ("ip_adapter", "3.to_k_lora.up.weight")):  # fmt: skip
        spoiled = {g: dict(tensors) for g, tensors in made.items()}
        spoiled[group][name] = spoiled[group][name].clone()
        spoiled[group][name].view(-1)[-1] = number
        with pytest.raises(errors.NotFiniteError, match=name.replace(".", r"\.")):
            read(files.write(tmp_path / "a", container, spoiled))


# --- damage, and harm ------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["nested pickle", "old pickle", "flat safetensors"])
def test_a_cut_file_is_named(container, tmp_path):
    path = files.write(tmp_path / "a", container, files.made("portrait"))
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 300, 5, 0):
        path.write_bytes(data[:size])
        with pytest.raises(errors.FileError):
            read(path)


def test_nothing_of_a_pickle_runs(tmp_path):
    harm = tmp_path / "harm"
    for zipped in (True, False):
        path = tmp_path / "a.bin"
        torch.save({**files.made("plus"), "x": Harm(harm)}, path,
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        with pytest.raises(errors.UnsafePickleError):
            read(path)
        assert not harm.exists()
    pickle.loads(pickle.dumps(Harm(harm)))
    assert harm.exists()


def test_views_of_one_memory_are_refused(tmp_path):
    """Else few bytes would fill the memory."""
    made, path = files.made("pulid v1"), tmp_path / "a.bin"
    shared = made["ip_adapter"]["1.to_k_ip.weight"]
    made["ip_adapter"]["3.to_k_ip.weight"] = shared  # a little is honest
    torch.save(made, path)
    assert torch.equal(read(path).key_value(SMALL.layers[1].path).to_k.weight, shared)
    shapes = files.pulid_v1(dataclasses.replace(SMALL, pulid=256, level=256))
    one = torch.randn(max(math.prod(shape) for shape in shapes.values()))
    made["image_proj"] = {n: one[: math.prod(s)].view(s) for n, s in shapes.items()}
    torch.save(made, path)
    with pytest.raises(errors.FileTooLargeError, match="share their memory"):
        read(path)


def test_a_pickle_that_changes_meanwhile_is_named(tmp_path, monkeypatch):
    path = files.write(tmp_path / "a.bin", "nested pickle", files.made("plus"))
    read_one = StoredTensor.read
    written = []

    def grow(self: StoredTensor) -> torch.Tensor:
        if not written:
            written.append(True)
            with path.open("ab") as file:
                file.write(b"more")
        return read_one(self)

    monkeypatch.setattr(StoredTensor, "read", grow)
    with pytest.raises(errors.FileChangedError):
        read(path)


@pytest.mark.parametrize(
    "options",
    [{"embedding": "unit"}, {"references": "all"}, {"plus_version": 3}, {"shortcut": float("nan")},
     {"layers": ()}],
)  # fmt: skip
def test_options_that_are_none(options):
    with pytest.raises(errors.OptionError):
        AdapterOptions(**options)
