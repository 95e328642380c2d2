"""Published adapters: every family in every container, built with the file's own numbers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infinite_id_core.files import adapters
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.files.safetensors_file import SafetensorsFile
from infinite_id_core.files.stored_tensor import StoredTensor
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.records import PublishedRecord
from infinite_id_core.sdxl import layers as core_layers
from infinite_id_core.sdxl.published_layers import SDXL_LAYERS, attention_of, number_of

from .. import published_files as files
from ..method.test_layers import SDXL, diffusers
from ..published_files import SMALL, TRUE

LAYERS = files.layers_of(SMALL, core_layers)
OPTIONS = AdapterOptions(layers=LAYERS)
# family -> tokens of one photo, features, families as people call them
KNOWN = {
    "base bigG": (4, {"pooled"}, "IP-Adapter"),
    "base H": (4, {"pooled"}, "IP-Adapter"),
    "full": (257, {"clip"}, "IP-Adapter full"),
    "plus": (5, {"clip"}, "IP-Adapter plus, plus-face or composition"),
    "faceid": (4, {"face"}, "IP-Adapter FaceID"),
    "portrait": (16, {"face"}, "IP-Adapter FaceID portrait"),
    "plus v2": (4, {"face", "clip"}, "IP-Adapter FaceID plus v2"),
    "raw face": (5, {"face"}, "InstantID"),
    "pulid v1": (10, {"face", "eva", "eva_levels"}, "PuLID v1"),
    "pulid v1.1": (6, {"face", "eva", "eva_levels"}, "PuLID v1.1"),
}


def read(path: Path, **options: object) -> Adapter:
    return adapters.read_adapter(path, options=AdapterOptions(**{"layers": LAYERS, **options}))


def check_numbers(adapter: Adapter, made: files.Nested) -> None:
    """Every tensor of the file stands where it belongs, and no other is there."""
    state = dict(adapter.state_dict())
    for name, tensor in made["image_proj"].items():
        assert torch.equal(state.pop(f"image_proj.{name}"), tensor)
    for layer in SMALL.layers:
        for part in "kv":
            wanted = made["ip_adapter"][f"{layer.number}.to_{part}_ip.weight"]
            assert torch.equal(state.pop(f"layers.{layer.path}.to_{part}.weight"), wanted)
    for name, tensor in made["ip_adapter"].items():
        if "_lora." in name:
            number, linear, side, _ = name.split(".")
            layer = next(y for y in SMALL.layers if y.number - 1 <= int(number) <= y.number)
            place = f"{layer.path}.attn{1 + int(number) % 2}"
            own = linear.removesuffix("_lora").replace("to_out", "to_out.0")
            assert torch.equal(state.pop(f"low_rank.{place}.{own}.{side}.weight"), tensor)
    assert state == {}


@pytest.mark.parametrize("container", files.CONTAINERS)
@pytest.mark.parametrize("family", files.PROJECTORS)
def test_every_family_in_every_container(family, container, tmp_path):
    made = files.made(family)
    adapter = read(files.write(tmp_path / "weights", container, made))
    tokens, features, name = KNOWN[family]
    assert isinstance(adapter.config, PublishedRecord) and adapter.config.family == name
    assert adapter.projector.tokens_per_reference == tokens and set(adapter.needs) == features
    assert adapter.widths == {layer.path: layer.width for layer in SMALL.layers}
    assert adapter.config.context_width == SMALL.context
    check_numbers(adapter, made)
    assert not any(p.requires_grad for p in adapter.parameters())


@pytest.mark.parametrize("container", ["nested pickle", "flat safetensors"])
@pytest.mark.parametrize("family", files.PROJECTORS)
def test_what_a_file_is_is_known_without_reading_it(family, container, tmp_path, monkeypatch):
    path = files.write(tmp_path / "a", container, files.made(family))
    whole = read(path)

    def no(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsFile, "tensor", no)
    monkeypatch.setattr(StoredTensor, "read", no)
    found = adapters.describe_adapter(path, OPTIONS)
    assert found.record == whole.config and dict(found.needs) == dict(whole.needs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("container", ["nested pickle", "flat safetensors"])
def test_the_numbers_keep_their_type(dtype, container, tmp_path):
    made = files.made("faceid", dtype=dtype)
    adapter = read(files.write(tmp_path / "a", container, made))
    assert {t.dtype for t in adapter.state_dict().values()} == {dtype}
    check_numbers(adapter, made)


def test_the_name_of_a_file_says_nothing(tmp_path):
    for name in ("ip-adapter-faceid-plusv2_sdxl.bin", "pulid.safetensors", "x.txt"):
        path = files.write(tmp_path / name, "nested pickle", files.made("plus"))
        assert read(path).config.family == "IP-Adapter plus, plus-face or composition"


MEASURE = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
import published_files
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.sdxl import layers
options = AdapterOptions(layers=published_files.layers_of(published_files.WIDE, layers))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
adapter = read_adapter(sys.argv[3], options=options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(os.name != "posix", reason="measures memory")
@pytest.mark.parametrize("container", ["nested pickle", "training pickle", "flat safetensors"])
def test_float16_is_read_without_a_second_copy(container, tmp_path):
    made = files.made("pulid v1", files.WIDE, dtype=torch.float16)
    path = files.write(tmp_path / "a", container, made, files.WIDE)
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(here.parents[1]), str(here), str(path)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    size = sum(2 * t.numel() for group in made.values() for t in group.values())
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert size > 100e6 and grown < 1.5 * size


# --- what each family reads ------------------------------------------------------------------


def needs(family: str, tmp_path: Path, **options: object) -> dict[str, tuple[object, ...]]:
    adapter = read(files.write(tmp_path / family, "nested pickle", files.made(family)), **options)
    return {n: (r.model, r.output, r.shape, r.cut) for n, r in adapter.needs.items()}


def test_encoders_and_their_outputs(tmp_path):
    states = ("ViT-H-14", "penultimate", (257, 1280), "arcface")
    normed, raw = ("buffalo_l/w600k_r50", "normed", (512,), ""), ("antelopev2/glintr100", "raw",
                                                                 (512,), "")  # fmt: skip
    assert needs("base bigG", tmp_path) == {
        "pooled": ("ViT-bigG-14", "projected", (1280,), "whole picture")
    }
    assert needs("base H", tmp_path) == {
        "pooled": ("ViT-H-14", "projected", (1024,), "whole picture")
    }
    assert needs("full", tmp_path) == needs("plus", tmp_path) == {"clip": states}
    assert needs("faceid", tmp_path) == needs("portrait", tmp_path) == {"face": normed}
    assert needs("plus v2", tmp_path) == {"face": normed, "clip": states}
    assert needs("raw face", tmp_path) == {"face": raw}
    pulid = {
        "face": raw,
        "eva": ("EVA02-L-14-336", "normed", (20,), "pulid"),
        "eva_levels": ("EVA02-L-14-336", "entering blocks 4, 8, 12, 16, 20", (5, 577, 28), "pulid"),
    }
    assert needs("pulid v1", tmp_path) == needs("pulid v1.1", tmp_path) == pulid


def test_what_is_overridden(tmp_path):
    unnorm = needs("raw face", tmp_path, recogniser="buffalo_l/w600k_r50")
    assert unnorm == {"face": ("buffalo_l/w600k_r50", "raw", (512,), "")}
    assert needs("faceid", tmp_path, embedding="raw")["face"][1] == "raw"
    assert needs("plus", tmp_path, whole_picture=True)["clip"][3] == "whole picture"
    assert needs("plus", tmp_path, image_encoder="made-H")["clip"][0] == "made-H"
    assert needs("pulid v1", tmp_path, recogniser="r/x")["face"][0] == "r/x"


def test_what_is_assumed_is_said(tmp_path):
    def summary(family: str, **options: object) -> str:
        path = files.write(tmp_path / family, "nested pickle", files.made(family))
        return read(path, **options).config.summary

    said = summary("raw face")
    assert said.startswith("InstantID\n") and "antelopev2/glintr100, raw" in said
    assert "assumed" in said and "buffalo_l" in said
    said = summary("raw face", recogniser="buffalo_l/w600k_r50")
    assert said.startswith("IP-Adapter FaceID portrait-unnorm\n") and "assumed" not in said
    said = summary("plus")
    assert "ViT-H-14, penultimate 257x1280" in said and "crop: the face" in said
    assert "assumed" in said and "assumed" not in summary("plus", whole_picture=False)
    assert "crop: whole picture" in summary("base H", whole_picture=True)
    assert summary("plus v2", plus_version=1).startswith("IP-Adapter FaceID plus v1\n")


def test_consistentid_is_the_plus_v2_in_it(tmp_path):
    made = files.made("plus v2")
    path = tmp_path / "ConsistentID.bin"
    torch.save(
        {
            "image_proj_model": made["image_proj"],
            "adapter_modules": made["ip_adapter"],
            "FacialEncoder": {"visual_projection.latents": torch.ones(1, 1, 4)},
        },
        path,
    )
    adapter = read(path)
    check_numbers(adapter, made)
    assert adapter.needs["clip"].cut == "whole picture"
    assert adapter.config.family.startswith("ConsistentID")
    assert adapter.config.left_out == ("FacialEncoder (1 tensors)",)


def test_portrait_unnorm_as_published_is_told_by_its_hash(tmp_path, monkeypatch):
    from infinite_id_core.files.published import face

    path = files.write(tmp_path / "a.bin", "nested pickle", files.made("raw face"))
    assert read(path).needs["face"].model == "antelopev2/glintr100"
    monkeypatch.setattr(face, "UNNORM_BYTES", path.stat().st_size)
    assert read(path).needs["face"].model == "antelopev2/glintr100"
    monkeypatch.setattr(face, "UNNORM_SHA256", face._sha256(path))
    adapter = read(path)
    assert adapter.needs["face"].model == "buffalo_l/w600k_r50"
    assert adapter.config.family == "IP-Adapter FaceID portrait-unnorm"
    assert adapter.config.assumed == ()


# --- the true sizes --------------------------------------------------------------------------


def test_the_numbers_of_the_layers():
    assert [layer.path for layer in SDXL_LAYERS] == [layer.path for layer in TRUE.layers]
    assert [layer.width for layer in SDXL_LAYERS] == [layer.width for layer in TRUE.layers]
    assert [number_of(y.path, SDXL_LAYERS) for y in TRUE.layers] == [y.number for y in TRUE.layers]
    for layer in TRUE.layers:
        assert attention_of(layer.number, SDXL_LAYERS) == f"{layer.path}.attn2"
        assert attention_of(layer.number - 1, SDXL_LAYERS) == f"{layer.path}.attn1"
    assert attention_of(140, SDXL_LAYERS) is None and attention_of(-1, SDXL_LAYERS) is None
    assert core_layers.layers_from_diffusers(diffusers(SDXL)) == SDXL_LAYERS


def test_the_numbers_are_those_of_diffusers_processors():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048, use_linear_projection=True,
        )  # fmt: skip
    processors = list(unet.attn_processors)
    assert len(processors) == 140
    for number, name in enumerate(processors):
        assert attention_of(number, SDXL_LAYERS) == name.removesuffix(".processor")


# Parameters by hand from the layers, and the published files' bytes where they are known.
KEY_VALUES = 340_787_200
LORA = 185_794_560
FILES = {  # name -> (family, has the LoRA, bytes of a number, bytes of the file or its MB)
    "ip-adapter_sdxl.safetensors": ("base bigG", False, 2, 702.6e6),
    "ip-adapter_sdxl_vit-h.safetensors": ("base H", False, 2, 698.4e6),
    "ip-adapter-plus_sdxl_vit-h.safetensors": ("plus", False, 2, 847.5e6),
    "ip-adapter-faceid_sdxl.bin": ("faceid", True, 2, 1_071_149_741),
    "ip-adapter-faceid-plusv2_sdxl.bin": ("plus v2", True, 2, 1_487_555_181),
    "ip-adapter-faceid-portrait_sdxl.bin": ("portrait", False, 2, 749_822_515),
    "ip-adapter-faceid-portrait_sdxl_unnorm.bin, older": ("raw face", False, 2, 845_552_136),
    "InstantID ip-adapter.bin": ("raw face", False, 4, 1_691_134_141),
    "pulid_v1.1.bin": ("pulid v1.1", False, 2, 984_405_232),
    "ip-adapter_pulid_sdxl_fp16.safetensors": ("pulid v1", False, 2, 791e6),
}


def meta_adapter(family: str, lora: bool) -> Adapter:
    """What a file of true sizes builds, without its numbers."""
    attention = {**files.key_values(TRUE), **(files.lora(TRUE) if lora else {})}
    groups = {"image_proj": files.PROJECTORS[family](TRUE), "ip_adapter": attention}
    return built_on_meta({f"{g}.{n}": s for g, part in groups.items() for n, s in part.items()})


def built_on_meta(shapes: files.Shapes) -> Adapter:
    from infinite_id_core.files.safetensors_file import Header, TensorEntry

    entries = {n: TensorEntry(dtype="F16", shape=s, start=0, end=0) for n, s in shapes.items()}

    class Meta:
        path, size, header = Path("meta"), 2**34, Header(tensors=entries, metadata={})

        def tensor(self, name: str, *_: object, **__: object) -> torch.Tensor:
            return torch.empty(shapes[name], dtype=torch.float16, device="meta")

    return adapters.format_of(Meta.path, Meta.header).build(Meta())


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_true_size_has_the_published_bytes(name):
    family, lora, width, known = FILES[name]
    adapter = meta_adapter(family, lora)
    state = adapter.state_dict()
    attention = sum(t.numel() for n, t in state.items() if n.startswith("layers."))
    assert attention == KEY_VALUES and len(adapter.widths) == 70
    assert sum(t.numel() for n, t in state.items() if n.startswith("low_rank.")) == LORA * lora
    assert len(adapter.low_rank_parts) == 560 * lora
    size = width * sum(t.numel() for t in state.values())
    if isinstance(known, float):  # published as megabytes
        assert round(size / 1e6, 0 if known == 791e6 else 1) == known / 1e6
    else:  # torch's archive adds a few hundred bytes a tensor
        assert 0 < known - size < 400 * len(state)


@pytest.mark.parametrize("family", files.PROJECTORS)
def test_true_sizes_are_built(family):
    adapter = meta_adapter(family, family in files.WITH_LORA)
    wanted = files.PROJECTORS[family](TRUE)
    state = adapter.projector.state_dict()
    assert {n.removeprefix("image_proj."): tuple(t.shape) for n, t in state.items()} == wanted
    counts = {"plus": 51, "raw face": 51, "pulid v1": 110, "pulid v1.1": 172}
    assert len(wanted) == counts.get(family, len(wanted))


@pytest.mark.parametrize("family", ["base H", "plus", "faceid", "plus v2"])
def test_layers_are_where_diffusers_puts_them(family, tmp_path):
    """diffusers loads the same dictionaries into a UNet, by numbers of its own."""
    from infinite_id_core.hosts.diffusers_unet import unet_layers

    from .. import train_world

    unet = train_world.micro_unet()
    layers = unet_layers(unet)
    sizes = dataclasses.replace(
        SMALL,
        context=train_world.CONTEXT,
        layers=tuple(
            files.Layer(number=2 * i + 1, path=layer.path, width=layer.width)
            for i, layer in enumerate(layers)
        ),
    )
    made = {**files.made(family, sizes), "ip_adapter": files.filled(files.key_values(sizes), 4)}
    path = files.write(tmp_path / "a", "nested pickle", made, sizes)
    adapter = adapters.read_adapter(path, options=AdapterOptions(layers=layers))
    unet._load_ip_adapter_weights([made], low_cpu_mem_usage=False)
    assert len(layers) > 3 and {y.path.split("_")[0] for y in layers} == {"down", "up", "mid"}
    for layer in layers:
        theirs = unet.attn_processors[f"{layer.path}.attn2.processor"]
        ours = adapter.key_value(layer.path)
        assert torch.equal(ours.to_k.weight, theirs.to_k_ip[0].weight)
        assert torch.equal(ours.to_v.weight, theirs.to_v_ip[0].weight)
