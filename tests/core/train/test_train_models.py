"""UNets, autoencoders and text encoders from the files people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infinite_id_core.errors import (
    FileMissingError,
    ModelMismatchError,
    NotFiniteError,
    NotSafetensorsError,
    NotSDXLError,
    TruncatedFileError,
)
from infinite_id_core.sdxl.schedule import NoiseSchedule
from trainer.models import text, vae
from trainer.models.unet import describe_unet, load_unet

from .. import train_world
from ..ldm_names import ldm_names


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same weights in two modules: at other addresses, sums are added up in another order."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def run_unet(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        out: torch.Tensor = unet(
            torch.randn(1, 4, 8, 8, generator=generator),
            torch.tensor([300]),
            torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator),
            added_cond_kwargs={
                "text_embeds": torch.ones(1, train_world.POOLED),
                "time_ids": torch.ones(1, 6),
            },
        ).sample
    return out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_gives_the_same_unet(tmp_path: Path, prefix: str) -> None:
    path = train_world.write_unet(tmp_path / "unet.safetensors", prefix)
    loaded = load_unet(path, head_width=32)
    wanted = train_world.micro_unet()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor), name
    same(run_unet(loaded.unet), run_unet(wanted))
    assert (loaded.context_width, loaded.pooled_width) == (16, 8)
    assert loaded.schedule == NoiseSchedule()
    assert not any(p.requires_grad for p in loaded.unet.parameters())
    assert loaded.fingerprint == load_unet(path, head_width=32).fingerprint


def test_other_models_in_a_checkpoint_are_left_alone(tmp_path: Path) -> None:
    path = train_world.write_unet(
        tmp_path / "all.safetensors",
        **{"first_stage_model.encoder.conv_in.weight": torch.zeros(1)},
    )
    same(run_unet(load_unet(path, head_width=32).unet), run_unet(train_world.micro_unet()))


def test_marks_of_v_prediction_are_read(tmp_path: Path) -> None:
    nothing = torch.zeros(0)
    path = train_world.write_unet(tmp_path / "v.safetensors", v_pred=nothing, ztsnr=nothing)
    loaded = load_unet(path, head_width=32)
    assert loaded.schedule == NoiseSchedule(prediction="v", zero_terminal_snr=True)
    chosen = NoiseSchedule(prediction="epsilon")
    assert load_unet(path, head_width=32, schedule=chosen).schedule == chosen


def test_a_diffusers_folder(tmp_path: Path) -> None:
    unet = train_world.micro_unet()
    unet.save_pretrained(tmp_path / "sdxl" / "unet")
    (tmp_path / "sdxl" / "scheduler").mkdir()
    (tmp_path / "sdxl" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"prediction_type": "v_prediction"}), encoding="utf-8"
    )
    loaded = load_unet(tmp_path / "sdxl")
    same(run_unet(loaded.unet), run_unet(unet))
    assert loaded.schedule.prediction == "v"
    assert load_unet(tmp_path / "sdxl" / "unet").schedule.prediction == "epsilon"
    with pytest.raises(FileMissingError, match="unet/config.json"):
        load_unet(tmp_path)


def damage(tmp_path: Path, change: Any) -> Path:
    path = train_world.write_unet(tmp_path / "bad.safetensors", "")
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


def test_what_is_not_sdxl_shaped_is_refused_by_name(tmp_path: Path) -> None:
    def refused(change: Any, match: str, head_width: int = 32) -> None:
        path = damage(tmp_path, change)
        with pytest.raises(NotSDXLError, match=match):
            describe_unet(path, head_width=head_width)

    refused(lambda t: t.pop("label_emb.0.0.weight"), "pooled text input: no")
    refused(lambda t: t.pop("out.2.bias"), "missing .'conv_out.bias'")
    refused(lambda t: t.update({"time_embed.0.scale": torch.ones(1)}), "unknown tensors")
    refused(
        lambda t: t.update({"out.0.bias": torch.ones(3)}), "another shape .'conv_norm_out.bias'"
    )
    refused(lambda _: None, "set model.head_width", head_width=48)
    refused(
        lambda t: [t.pop(n) for n in list(t) if ".attn2.to_k." in n],
        "found 0 cross-attention blocks",
    )
    first = "input_blocks.0.0.weight"  # an inpainting model also reads a mask and a picture
    refused(lambda t: t.update({first: torch.zeros(32, 9, 3, 3)}), "reads 9 channels, SDXL's 4")


def test_relatives_of_sdxl_in_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    base = {"addition_embed_type": "text_time", "cross_attention_dim": 1280}
    for change, match in (
        ({"in_channels": 9}, "reads 9 channels"),
        ({"projection_class_embeddings_input_dim": 2560}, "refiner; give the base"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**base, **change}), encoding="utf-8")
        with pytest.raises(NotSDXLError, match=match):
            describe_unet(tmp_path)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet.alpha": torch.ones(1)}, lora)
    with pytest.raises(NotSDXLError, match="no UNet was found among its 1 tensors"):
        load_unet(lora)
    save_file({"conv_in.weight": torch.ones(1)}, lora)
    with pytest.raises(NotSDXLError, match="diffusers' naming: give the folder"):
        load_unet(lora)
    with pytest.raises(FileMissingError):
        load_unet(tmp_path / "none.safetensors")
    pickle = tmp_path / "pickle.safetensors"
    torch.save({"a": torch.ones(1)}, pickle)
    with pytest.raises(NotSafetensorsError):
        load_unet(pickle)
    whole = train_world.write_unet(tmp_path / "whole.safetensors")
    short = tmp_path / "short.safetensors"
    short.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(TruncatedFileError):
        load_unet(short, head_width=32)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = damage(tmp_path, lambda t: t["out.2.bias"].fill_(float("nan")))
    with pytest.raises(NotFiniteError, match=r"out\.2\.bias"):
        load_unet(path, head_width=32)


def test_the_embedded_unet_has_the_weights_its_node_gives() -> None:
    """Names by ldm, read by those names: what ComfyUI's node does with the same file."""
    from microworld import files

    loaded = load_unet("microworld")
    names = ldm_names(loaded.unet)
    state = loaded.unet.state_dict()
    ldm = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(state[names[ldm]], files.read_weights(files.UNET)[ldm])


# --- autoencoders ----------------------------------------------------------------------------


def small_full_vae() -> Any:
    """AutoencoderKL of SDXL's shape, but for its widths."""
    import diffusers

    module = diffusers.AutoencoderKL(**{**vae._SDXL, "block_out_channels": (32, 32, 32, 32)})
    train_world.fill(module, 0)
    return module.eval()


def test_a_diffusers_folder_gives_the_autoencoder(tmp_path: Path) -> None:
    module = small_full_vae()
    module.save_pretrained(tmp_path / "vae")
    loaded = vae.load_vae(tmp_path)
    pixels = torch.rand(2, 3, 64, 48)
    latents = loaded.encode(pixels)
    assert latents.shape == (2, 4, 8, 6)
    with torch.no_grad():
        wanted = module.encode(pixels * 2 - 1).latent_dist.mode() * 0.13025
    same(latents, wanted)
    assert loaded.decode(latents).shape == (2, 3, 64, 48)


def test_taesd_is_read_in_comfyuis_naming(tmp_path: Path) -> None:
    import diffusers

    module = diffusers.AutoencoderTiny()
    train_world.fill(module, 0, gain=1.0)
    named = {}
    for name, tensor in module.state_dict().items():
        side, _, number, rest = name.split(".", 3)
        named[f"taesd_{side}.{int(number) + (side == 'decoder')}.{rest}"] = tensor.contiguous()
    save_file({**named, "vae_scale": torch.tensor(0.13025)}, tmp_path / "tiny.safetensors")
    loaded = vae.load_vae(tmp_path / "tiny.safetensors")
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        wanted = module.encode(pixels * 2 - 1).latents
    same(loaded.encode(pixels), wanted)


def test_a_file_without_autoencoder_is_named(tmp_path: Path) -> None:
    path = train_world.write_unet(tmp_path / "unet.safetensors")
    with pytest.raises(ModelMismatchError, match="no autoencoder was found"):
        vae.check_vae(path)


# --- text ------------------------------------------------------------------------------------

WORDS = ["a photo of a person", "", "a sketch of a man with a red hat in a city " * 12]


def small_encoder(seed: int, projection: int) -> Any:
    import transformers

    options = transformers.CLIPTextConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=1,
        max_position_embeddings=77, vocab_size=49408, eos_token_id=49407,
        hidden_act="gelu" if seed else "quick_gelu", projection_dim=projection,
    )  # fmt: skip
    module = transformers.CLIPTextModelWithProjection(options)
    train_world.fill(module, seed)
    return module.eval()


def as_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names as a checkpoint's CLIP-G has them, written out by hand."""
    found = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    for layer in range(2):
        old, new = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(
                [state[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            found[f"{new}.attn.out_proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
            for theirs, ours in (
                ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            ):  # fmt: skip
                found[f"{new}.{theirs}.{kind}"] = state[f"{old}.{ours}.{kind}"]
    return found


def test_text_encoders_of_every_kind_of_file_agree(tmp_path: Path) -> None:
    first, second = small_encoder(0, 64), small_encoder(1, 48)
    comfy = {
        f"clip_{name}.transformer.{key}": tensor.contiguous()
        for name, module in (("l", first), ("g", second))
        for key, tensor in module.state_dict().items()
    }
    save_file(comfy, tmp_path / "comfy.safetensors")
    checkpoint = {
        f"conditioner.embedders.0.transformer.{key}": tensor.contiguous()
        for key, tensor in first.state_dict().items()
        if "text_projection" not in key
    }
    for key, tensor in as_open_clip(second.state_dict()).items():
        checkpoint[f"conditioner.embedders.1.model.{key}"] = tensor.contiguous()
    save_file(checkpoint, tmp_path / "checkpoint.safetensors")
    prompts = [
        text.load_text_encoders(tmp_path / name).encode(WORDS)
        for name in ("comfy.safetensors", "checkpoint.safetensors")
    ]
    assert prompts[0].context.shape == (3, 77, 128)
    assert prompts[0].pooled.shape == (3, 48)
    same(prompts[0].context, prompts[1].context)
    same(prompts[0].pooled, prompts[1].pooled)
    assert float((prompts[0].context[0] - prompts[0].context[1]).abs().max()) > 1e-2
    with pytest.raises(ModelMismatchError, match="two text encoders were not found"):
        text.load_text_encoders(train_world.write_unet(tmp_path / "unet.safetensors"))
