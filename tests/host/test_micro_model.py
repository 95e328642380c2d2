"""The embedded model through ComfyUI's own nodes."""

import importlib

import comfy.lora
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

import nodes
from microworld import comfy_models, config, files
from microworld.portraits import HELD_OUT_SEEDS, Attributes, Identity, render

PLAIN = Attributes(background=2, style=0, expression=0, accessory=0)
pytestmark = pytest.mark.usefixtures("inference_mode_for_micro")


@pytest.fixture
def inference_mode_for_micro():
    with torch.inference_mode():
        yield


@pytest.fixture
def fresh_caches(monkeypatch):
    """Builders that remember nothing, before and after: the test changes the files they read."""
    for name in ("_unet", "_clip", "load_vae"):
        monkeypatch.setattr(comfy_models, name, getattr(comfy_models, name).__wrapped__)


def encode(text, clip=None):
    return nodes.CLIPTextEncode().encode(clip or comfy_models.load_clip(), text)[0]


def sample(model, text="a person in a garden", sampler="euler", scheduler="normal", seed=3):
    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    return nodes.KSampler().sample(
        model, seed, 6, 5.0, sampler, scheduler, encode(text), encode(""), latent
    )[0]["samples"]


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("euler", "normal"), ("dpmpp_2m", "karras"), ("uni_pc", "normal"), ("dpmpp_sde", "normal")],
)
def test_sampling_is_finite_bounded_and_repeatable(sampler, scheduler):
    unet = comfy_models.load_unet()
    first = sample(unet, sampler=sampler, scheduler=scheduler)
    assert first.shape == (2, 4, 16, 16)
    assert torch.isfinite(first).all()
    assert (first * comfy_models.SDXL_LATENT_SCALE).std() < 10
    torch.testing.assert_close(
        sample(unet, sampler=sampler, scheduler=scheduler), first, rtol=0, atol=0
    )


def test_the_prompt_matters_and_so_does_the_seed():
    unet = comfy_models.load_unet()
    first = sample(unet)
    assert (sample(unet, text="a sketch of a man at the beach") - first).std() > 0.05 * first.std()
    assert (sample(unet, seed=4) - first).std() > 0.05 * first.std()


def test_text_encoding_has_sdxls_two_outputs():
    context, extra = encode("a photo of a (smiling:1.3) person")[0]
    assert context.shape == (1, 77, 128)
    assert extra["pooled_output"].shape == (1, 64)
    longer, _ = encode("word " * 100)[0]
    assert longer.shape == (1, 154, 128)
    other, _ = encode("a photo of a (smiling:0.7) person")[0]
    assert not torch.equal(context, other)


def test_clip_skip_changes_the_context():
    clip = comfy_models.load_clip()
    skipped = nodes.CLIPSetLastLayer().set_last_layer(clip, -3)[0]
    assert not torch.equal(encode("a person", skipped)[0][0], encode("a person", clip)[0][0])


def test_vae_goes_to_pixels_and_back():
    vae = comfy_models.load_vae()
    image = nodes.VAEDecode().decode(vae, {"samples": torch.randn(2, 4, 16, 16)})[0]
    assert image.shape == (2, 128, 128, 3)
    assert image.min() >= 0
    assert image.max() <= 1
    assert nodes.VAEEncode().encode(vae, image)[0]["samples"].shape == (2, 4, 16, 16)


def test_a_vae_latent_reaches_the_unet_unscaled():
    """The UNet's latents are TAESD's own: the host's SDXL scale is undone by the VAE's."""
    vae = comfy_models.load_vae()
    image = torch.rand(1, 64, 64, 3)
    latent = comfy_models.load_unet().model.process_latent_in(vae.encode(image))
    raw = vae.first_stage_model.taesd_encoder(image.movedim(-1, 1).to(vae.vae_dtype)).float()
    torch.testing.assert_close(latent, raw, rtol=1e-3, atol=1e-3)


def test_unet_is_sdxl_shaped():
    model = comfy_models.load_unet().model
    assert type(model).__name__ == "SDXL"
    assert model.adm_channels == 1600
    names = [n for n, _ in model.diffusion_model.named_modules() if n.endswith("attn2")]
    down, up = config.UNET["transformer_depth"], config.UNET["transformer_depth_output"]
    assert len(names) == sum(down) + config.UNET["transformer_depth_middle"] + sum(up)
    assert not any(name.startswith(("input_blocks.1.", "input_blocks.2.")) for name in names)
    attention = model.diffusion_model.get_submodule(names[0])
    assert attention.heads * 32 == attention.to_q.weight.shape[0] == 64
    assert attention.to_k.weight.shape[1] == 128


def test_a_lora_reaches_unet_and_both_text_encoders():
    unet, clip = comfy_models.load_unet(), comfy_models.load_clip()
    wanted = {
        # kohya's and diffusers' names
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (64, 128),
        "unet.down_blocks.1.attentions.1.transformer_blocks.0.attn2.processor.to_v": (64, 128),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (256, 64),
        "lora_te2_text_model_encoder_layers_1_mlp_fc2": (64, 256),
    }
    keys = comfy.lora.model_lora_keys_unet(unet.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    assert set(wanted) <= set(keys)
    lora = {}
    for name, (rows, columns) in wanted.items():
        lora[f"{name}.lora_up.weight"] = torch.ones(rows, 2)
        lora[f"{name}.lora_down.weight"] = torch.full((2, columns), 0.05)
    patched, patched_clip = comfy.sd.load_lora_for_models(unet, clip, lora, 1.0, 1.0)
    assert len(patched.patches) == 2
    assert len(patched_clip.patcher.patches) == 2
    before = sample(unet)
    changed = sample(patched)
    assert not torch.equal(changed, before)
    assert torch.equal(sample(unet), before)
    assert not torch.equal(encode("a person", patched_clip)[0][0], encode("a person", clip)[0][0])


def test_every_call_shares_one_set_of_weights():
    first, second = comfy_models.load_unet(), comfy_models.load_unet()
    assert first is not second
    assert first.model is second.model
    assert first.is_clone(second)
    clips = comfy_models.load_clip(), comfy_models.load_clip()
    assert clips[0].cond_stage_model is clips[1].cond_stage_model
    assert comfy_models.load_vae() is comfy_models.load_vae()


def test_node_gives_all_three_and_has_a_help_text_on_each(pack):
    node = importlib.import_module(f"{pack.__name__}.nodes.micro").InfiniteIDMicroModel
    schema = node.define_schema()
    assert schema.node_id == "InfiniteIDMicroModel"
    assert [output.io_type for output in schema.outputs] == ["MODEL", "CLIP", "VAE"]
    assert all(output.tooltip for output in schema.outputs)
    model, clip, vae = node.execute().args
    assert (type(model).__name__, type(clip).__name__, type(vae).__name__) == (
        "ModelPatcher", "CLIP", "VAE",
    )  # fmt: skip
    again = node.execute().args
    assert again[0].model is model.model


def drawn(reference, seed):
    """Numbers of the names and shapes of a model's weights, small enough to compute with."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in reference.items()}


def test_every_storage_of_a_weight_file_is_read(tmp_path, monkeypatch, fresh_caches):
    """All three stored compactly, as the shipped files are: int8 rows and a few tokens' vectors."""
    unet = drawn(comfy_models._unet_reference(), 7)
    save_file(files.quantise(unet), tmp_path / "unet.safetensors")
    text = drawn(comfy_models._text_reference(), 7)
    ids = torch.tensor([0, 320, 2533, 49406, 49407])
    save_file(files.quantise(files.compact_vocabularies(text, ids)), tmp_path / "text.safetensors")
    vae = drawn(comfy_models._vae_reference(), 7)
    save_file(files.quantise(vae), tmp_path / "vae.safetensors")
    assert (tmp_path / "text.safetensors").stat().st_size < 700_000
    monkeypatch.setattr(files, "UNET", tmp_path / "unet.safetensors")
    monkeypatch.setattr(files, "TEXT_ENCODERS", tmp_path / "text.safetensors")
    monkeypatch.setattr(files, "VAE", tmp_path / "vae.safetensors")

    key = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    loaded = comfy_models.load_unet().model.diffusion_model.state_dict()[key]
    torch.testing.assert_close(loaded, unet[key], rtol=0, atol=unet[key].abs().max().item() / 200)

    embedding = comfy_models.load_clip().cond_stage_model.clip_l.transformer.get_input_embeddings()
    table = embedding.weight.float()
    rows = text["clip_l.transformer.text_model.embeddings.token_embedding.weight"]
    assert table.shape == (49408, 64)
    torch.testing.assert_close(table[2533], rows[2533], rtol=0, atol=0.03)
    torch.testing.assert_close(table[5], rows[ids].mean(0), rtol=0, atol=0.03)

    image = comfy_models.load_vae().decode(torch.zeros(1, 4, 8, 8))
    assert torch.isfinite(image).all()


def test_a_file_of_another_shape_is_named(tmp_path, monkeypatch, fresh_caches):
    state = drawn(comfy_models._unet_reference(), 0)
    state.pop("out.2.weight")
    save_file(state, tmp_path / "unet.safetensors")
    monkeypatch.setattr(files, "UNET", tmp_path / "unet.safetensors")
    with pytest.raises(files.MicroWeightsError, match=r"unet\.safetensors.*out\.2\.weight"):
        comfy_models.load_unet()


def test_a_portrait_is_its_number_and_nobody_of_the_training(pack):
    node = importlib.import_module(f"{pack.__name__}.nodes.micro").InfiniteIDMicroPortrait
    first, again, other = (node.execute(n, 128).args[0] for n in (2, 2, 3))
    assert first.shape == (1, 128, 128, 3) and 0 <= first.min() < 0.2 < first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    held_out = render(Identity.from_seed(HELD_OUT_SEEDS[2]), PLAIN, size=128)
    assert torch.equal((first[0] * 255).round().byte(), torch.from_numpy(held_out))
