"""The two nodes: from a published file in a model folder, photos and a prompt to a latent."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch

import nodes as host_nodes
from microworld.people import reference_picture

from ..core import published_files as files
from ..core import tiny_eva
from . import tiny_sdxl
from .runs import error, run

FAMILIES = ("base H", "full", "plus", "faceid", "portrait", "plus v2", "raw face")
FACELESS = ("base H",)


class Encoder:
    """An image encoder as wide as ViT-H: what it gives follows from the picture's colours."""

    clip_model = "ViT-H-14"
    image_size = 224
    image_mean = (0.5, 0.5, 0.5)

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Any:
        draw = torch.Generator().manual_seed(3)
        colours = image.mean(dim=(1, 2)) - torch.tensor(self.image_mean)  # [B, 3]
        states = torch.tanh(colours @ torch.randn(3, 257 * 1280, generator=draw))
        embeds = torch.tanh(colours @ torch.randn(3, 1024, generator=draw))
        states = states.view(len(image), 257, 1280)
        return SimpleNamespace(
            last_hidden_state=states, penultimate_hidden_states=states * 0.5, image_embeds=embeds
        )


@pytest.fixture(scope="module")
def simple(pack: Any) -> Any:
    return importlib.import_module(f"{pack.__name__}.nodes.simple")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_sdxl.tiny_model()


@pytest.fixture(scope="module")
def layers(pack: Any, model: Any) -> Any:
    return pack.infinite_id_core.hosts.comfyui.model_layers(model)


@pytest.fixture(scope="module")
def sizes(layers: Any) -> files.Sizes:
    """The tiny UNet's layers, numbered as published files number SDXL's."""
    return files.Sizes(
        layers=tuple(
            files.Layer(number=2 * i + 1, path=layer.path, width=layer.width)
            for i, layer in enumerate(layers)
        ),
        context=tiny_sdxl.CONTEXT, width=48, heads=2, face_heads=3, tokens=5, face_hidden=40,
        rank=4, pulid=24, former_heads=1, former_tokens=6, eva=tiny_eva.HEAD, level=tiny_eva.WIDTH,
    )  # fmt: skip


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(np.array(reference_picture())).float()[None] / 255


@pytest.fixture
def load(
    pack: Any, simple: Any, layers: Any, sizes: files.Sizes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:  # fmt: skip
    """Loads a made file of a family by the node, from a folder where other packs keep theirs."""
    for name in ("family", "attention"):
        module = importlib.import_module(f"{pack.__name__}.infinite_id_core.files.published.{name}")
        monkeypatch.setattr(module, "SDXL_LAYERS", layers)
    monkeypatch.setattr(
        importlib.import_module(f"{pack.__name__}.infinite_id_core.files.published.family"),
        "check_generation",
        lambda *_: None,
    )
    embedded = importlib.import_module(f"{pack.__name__}.microworld.files")
    monkeypatch.setattr(simple.folders, "insightface_roots", lambda: [embedded.INSIGHTFACE_ROOT])
    monkeypatch.setattr(simple, "_encoder_file", lambda *_: Path("made"))
    monkeypatch.setattr(simple, "_load_encoder", lambda _: Encoder())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "ipadapter", ([str(tmp_path)], set()))
    folder_paths.filename_list_cache.pop("ipadapter", None)
    simple.folders.register()

    def make(family: str, container: str = "nested pickle", seed: int = 1, **widgets: Any) -> Any:
        name = f"{family}.{'safetensors' if 'safetensors' in container else 'bin'}"
        made = files.made(family, sizes, seed)
        files.write(tmp_path / name, container, made, sizes)
        given = {
            "image_encoder": "auto", "face_models": "microworld", "reads": "auto",
            "lora": "auto", "lora_strength": 1.0, **widgets,
        }  # fmt: skip
        if family in FACELESS:
            given["face_models"] = "auto"
        return execute("InfiniteIDLoader", adapter=f"ipadapter/{name}", **given)

    return make


def execute(name: str, **inputs: Any) -> Any:
    return host_nodes.NODE_CLASS_MAPPINGS[name].execute(**inputs)


def person(model: Any, kit: Any, photo: torch.Tensor, **widgets: Any) -> tuple[Any, ...]:
    given = {
        "strength": 1.0, "preset": "balanced", "start_percent": 0.0, "end_percent": 1.0, **widgets,
    }  # fmt: skip
    made = execute("InfiniteIDPerson", model=model, infinite_id=kit, photos=photo, **given)
    return tuple(made.args)


@pytest.mark.parametrize("container", ["nested pickle", "flat safetensors", "training safetensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_a_photo_and_a_prompt_make_a_picture(
    family: str, container: str, load: Any, model: Any, photo: torch.Tensor
) -> None:
    loaded = load(family, container)
    kit = loaded.args[0]
    plain = run(model)
    for preset in ("balanced", "one stream"):
        patched, identity, preview = person(model, kit, photo, preset=preset)
        made = run(patched)
        assert made.isfinite().all() and error(made, plain) > 1e-3
    assert identity.references == 1 and preview.shape[0] == 1
    assert error(run(model), plain) == 0.0


@pytest.mark.parametrize("family", ["pulid v1", "pulid v1.1"])
def test_pulid_reads_the_photo_by_its_own_encoder(
    family: str, pack: Any, load: Any, simple: Any, model: Any, photo: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    host = importlib.import_module(f"{pack.__name__}.infinite_id_core.hosts.comfyui_eva")
    encoder = host.ManagedEva(host.EvaVision(tiny_eva.tower(), tiny_eva.BLOCKS))
    monkeypatch.setattr(simple, "_load_encoder", lambda _: encoder)
    loaded = load(family)
    assert "face parsing: not installed" in loaded.ui.as_dict()["text"][0]
    plain, ends = run(model), []
    for preset in ("balanced", "one stream"):
        patched, identity, _ = person(model, loaded.args[0], photo, preset=preset)
        ends.append(run(patched))
        assert ends[-1].isfinite().all() and error(ends[-1], plain) > 1e-3
    assert {"face", "eva", "eva_levels"} == set(identity.features)
    neutral = load(family, pulid_mode="neutral").args[0]
    one = run(person(model, neutral, photo, preset="one stream")[0])
    assert error(one, ends[1]) > 1e-4
    two = run(person(model, neutral, photo, preset="balanced")[0])
    assert error(two, ends[0]) == 0.0  # the mode is of one stream alone


def test_pulids_missing_encoder_is_named(
    load: Any, simple: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simple, "_encoder_file", lambda *_: None)
    with pytest.raises(Exception, match=r"EVA02_CLIP_L_336_psz14_s6B\.pt \(models/clip_vision\)"):
        load("pulid v1")


def test_the_photo_is_read_once_and_strength_is_not_of_it(
    load: Any, model: Any, photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = load("plus v2").args[0]
    first = person(model, kit, photo)[1]
    monkeypatch.setattr(Encoder, "encode_image", None)
    assert person(model, kit, photo, strength=0.5)[1] is first
    assert person(model, kit, photo.clone(), preset="style")[1] is first


def test_the_lora_acts_and_can_be_left_out(load: Any, model: Any, photo: torch.Tensor) -> None:
    runs = {}
    for name, widgets in {"on": {}, "off": {"lora": "off"}, "0": {"lora_strength": 0.0}}.items():
        runs[name] = run(person(model, load("faceid", **widgets).args[0], photo)[0])
    assert error(runs["off"], runs["0"]) == 0.0
    assert error(runs["on"], runs["off"]) > 1e-3


def test_in_two_streams_the_lora_is_the_persons_alone(
    pack: Any, load: Any, model: Any, photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text stream ends where it ends without a LoRA, to the bit; on all rows it does not."""
    module = importlib.import_module(f"{pack.__name__}.infinite_id_core.hosts.comfyui")
    texts, ends = [], {}
    monkeypatch.setattr(module._text_latents, "keep", lambda _, text: texts.append(text))
    steps = {"last_step": 2}
    for rows in ("auto", "identity rows", "all rows", "off"):
        patched = person(model, load("faceid", lora=rows).args[0], photo)[0]
        ends[rows] = (run(patched, **steps), texts.pop())
    assert torch.equal(ends["auto"][0], ends["identity rows"][0])
    assert torch.equal(ends["auto"][1], ends["off"][1])
    assert error(ends["auto"][0], ends["off"][0]) > 1e-3
    assert error(ends["all rows"][1], ends["off"][1]) > 1e-3


def test_in_one_stream_the_lora_is_in_the_weights_once_however_many_people(
    load: Any, model: Any, photo: torch.Tensor
) -> None:
    kit = load("faceid").args[0]
    one = person(model, kit, photo, preset="one stream")[0]
    two = person(one, kit, photo, preset="one stream")[0]
    assert one.patches and {k: len(p) for k, p in two.patches.items()} == {
        k: len(p) for k, p in one.patches.items()
    }
    assert not person(model, kit, photo)[0].patches and not model.patches


def test_people_of_one_lora_get_it_once(load: Any, model: Any, photo: torch.Tensor) -> None:
    """A second person of hardly any strength changes hardly anything; twice the LoRA would."""
    kit = load("faceid").args[0]
    one = person(model, kit, photo)[0]
    two = person(one, kit, photo, strength=1e-6)[0]
    assert error(run(two), run(one)) < 1e-3


def test_what_it_is_stands_on_the_node(load: Any) -> None:
    said = load("plus v2").ui.as_dict()["text"][0]
    assert "IP-Adapter FaceID plus v2" in said and "microworld/rec" in said and "LoRA: 1" in said
    assert "assumed" in load("plus").ui.as_dict()["text"][0]


def test_an_identity_of_two_families_serves_both_without_the_photo(
    pack: Any, load: Any, model: Any, photo: torch.Tensor
) -> None:
    core = pack.infinite_id_core
    kits = [load(family).args[0] for family in ("plus", "raw face")]
    adapters = [kit.adapter.adapter for kit in kits]
    found = core.faces.find.find_faces(kits[0].face_analysis, photo[0]).chosen[0]
    reference = core.encoders.references.Reference(photo=photo[0], face=found)
    both = core.encoders.references.read_references([reference], adapters, Encoder())
    for kit in kits:
        alone = person(model, kit, photo)[0]
        together = core.hosts.comfyui.apply_identity(model, kit.adapter, both)
        assert error(run(together), run(alone)) < 1e-5


def test_all_that_is_missing_is_named_at_once(
    load: Any, simple: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simple, "_encoder_file", lambda *_: None)
    with pytest.raises(Exception, match="needs 2 more") as caught:
        load("plus v2", face_models="auto")
    assert "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors" in str(caught.value)
    assert "models/insightface/models/buffalo_l" in str(caught.value)


def test_the_list_tells_the_family(load: Any, simple: Any) -> None:
    load("plus")
    schema = simple.InfiniteIDLoader.define_schema()
    listed = next(entry for entry in schema.inputs if entry.id == "adapter").options
    assert "ipadapter/plus.bin [IP-Adapter plus, plus-face or composition]" in listed


def test_a_file_that_went_a_moment_ago_is_not_listed(
    load: Any, simple: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI keeps its list where the folder's time is the same; no node may break by that."""
    listing = simple.folders.folder_paths.get_filename_list
    stale = {"ipadapter": ["gone.bin"], "infinite_id": ["gone.safetensors"]}
    monkeypatch.setattr(
        simple.folders.folder_paths,
        "get_filename_list",
        lambda kind: [*listing(kind), *stale.get(kind, [])],
    )
    schema = simple.InfiniteIDLoader.define_schema()
    listed = next(entry for entry in schema.inputs if entry.id == "adapter").options
    assert listed and not any("gone" in name for name in listed)


def test_the_embedded_default_is_two_nodes_as_well(photo: torch.Tensor) -> None:
    micro = execute("InfiniteIDMicroModel").args[0]
    widgets = {"image_encoder": "auto", "face_models": "auto", "reads": "auto"}
    kit = execute(
        "InfiniteIDLoader", adapter="microworld (embedded)", lora="off", lora_strength=1.0,
        **widgets,
    ).args[0]  # fmt: skip
    assert person(micro, kit, photo)[1].references == 1
