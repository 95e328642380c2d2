"""What microworld/train makes is what ComfyUI computes: the same outputs on the same weights."""

import comfy.model_management
import pytest
import torch

import nodes
from lab.train import export, text, unet, vae
from lab.train.loop import save_atomic
from microworld import comfy_models, files


@pytest.fixture
def exact_files(monkeypatch, tmp_path):
    """Exports go to a folder of the test, unquantised, and the builders read them from there."""
    for name in ("UNET", "TEXT_ENCODERS", "VAE"):
        monkeypatch.setattr(files, name, tmp_path / f"{name.lower()}.safetensors")
    for name in ("_unet", "_clip", "load_vae"):
        monkeypatch.setattr(comfy_models, name, getattr(comfy_models, name).__wrapped__)
    monkeypatch.setattr(files, "quantise", dict)
    return tmp_path


@pytest.fixture
def base(exact_files):
    torch.manual_seed(0)
    model = unet.TextToImage().eval()
    for module in model.unet.modules():  # norms that do nothing would hide a swapped tensor
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
    save_atomic(exact_files / "unet.pt", {"model": model.state_dict(), "average": {}, "step": 1})
    export.export_unet(exact_files)
    return model


@torch.no_grad()
def test_the_unet_is_the_same_in_diffusers_and_comfyui(base):
    patcher = comfy_models._unet()
    comfy.model_management.load_models_gpu([patcher])
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, unet.CONTEXT_WIDTH)
    pooled, times = torch.randn(2, 64), torch.tensor([3, 700])
    ids = torch.tensor([[128, 96, 8, 0, 128, 128]] * 2)
    ours = base.unet(
        x, times, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
    ).sample
    # SDXL.encode_adm: each id as 256 sines, after the pooled text.
    sines = patcher.model.embedder(ids.flatten().float()).reshape(2, -1)
    theirs = patcher.model.diffusion_model(
        x, timesteps=times.float(), context=context, y=torch.cat([pooled, sines], dim=1)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["a pencil sketch of a man in the snow, very dark skin", ""])
def test_the_text_encoders_are_the_same_in_transformers_and_comfyui(base, prompt):
    clip = comfy_models._clip()
    ours, pooled = base.text(text.tokenize([prompt]))
    [[theirs, extra]] = nodes.CLIPTextEncode().encode(clip, prompt)[0]
    # Token embeddings are stored in half precision.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3)
    torch.testing.assert_close(pooled, extra["pooled_output"], rtol=0, atol=4e-3)


@torch.no_grad()
def test_an_unknown_word_gets_the_mean_of_the_vocabulary(base):
    ours, _ = base.text(text.tokenize(["a photo of a zebra"]))
    [[theirs, _]] = nodes.CLIPTextEncode().encode(comfy_models._clip(), "a photo of a zebra")[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3)


@torch.no_grad()
def test_the_widened_autoencoder_computes_what_the_narrow_one_does(exact_files, monkeypatch):
    torch.manual_seed(0)
    model = vae.Autoencoder().eval()
    monkeypatch.setattr(export, "autoencoder", lambda folder: model)
    export.export_vae(exact_files)
    host = comfy_models.load_vae()
    pictures = torch.rand(2, 64, 64, 3)
    latents = model.encode(pictures.permute(0, 3, 1, 2))
    torch.testing.assert_close(
        host.encode(pictures) * vae.SDXL_SCALE, latents, rtol=1e-4, atol=1e-4
    )
    decoded = model.decode(latents).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(host.decode(latents / vae.SDXL_SCALE), decoded, rtol=1e-4, atol=1e-4)
