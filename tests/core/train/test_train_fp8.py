"""The frozen UNet in 8 bits: the same gradients as of rounded weights, half the memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.hosts.diffusers_unet import text_projections, unet_layers
from trainer.config import TrainConfig
from trainer.config_file import parse_config
from trainer.errors import ConfigValueError, ResumeError
from trainer.models.unet import load_unet
from trainer.train import fp8, loop, state
from trainer.train.checks import build_meta
from trainer.train.estimate import dry_run, estimate_memory

from .. import train_world

EIGHT = {"unet_dtype": "fp8"}


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    def make(name: str = "run", **sections: Any) -> TrainConfig:
        run = {"output": str(tmp_path / name), **sections.pop("run", {})}
        return train_world.config(train_world.shared(), run=run, **sections)

    return make


def narrow_and_rounded() -> tuple[Any, Any]:
    """A UNet in 8 bits, and one of ordinary layers with the weights that these stand for."""
    rounded = train_world.micro_unet()
    narrow = copy.deepcopy(rounded)
    fp8.narrow(narrow, text=True)
    for name, module in narrow.named_modules():
        if isinstance(module, fp8.NarrowLinear | fp8.NarrowConv2d):
            rounded.get_submodule(name).weight.data = module.widened()
    return narrow, rounded


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(5)
    made = {
        "sample": torch.randn(2, 4, 12, 8, generator=chance).to(dtype),
        "context": torch.randn(2, 7, train_world.CONTEXT, generator=chance).to(dtype),
        "pooled": torch.randn(2, train_world.POOLED, generator=chance).to(dtype),
    }
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def forward(unet: Any, given: dict[str, Any]) -> torch.Tensor:
    output: torch.Tensor = unet(
        given["sample"],
        torch.tensor([10, 700]),
        encoder_hidden_states=given["context"],
        added_cond_kwargs={
            "text_embeds": given["pooled"],
            "time_ids": torch.tensor([[96.0, 64, 0, 0, 96, 64]]).expand(2, -1),
        },
        return_dict=False,
    )[0]
    return output


@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_the_rounded_weights(checkpointing: bool) -> None:
    narrow, rounded = narrow_and_rounded()
    results = []
    for unet in (narrow, rounded):
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        given = inputs()
        output = forward(unet, given)
        output.square().sum().backward()
        results.append((output.detach(), {name: t.grad for name, t in given.items()}))
    (output, gradients), (wanted, wanted_gradients) = results
    assert torch.allclose(output, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        other = wanted_gradients[name]
        assert float(other.abs().max()) > 0, name
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert not any(p.requires_grad for p in narrow.parameters())


def test_rounding_keeps_three_bits_of_each_channel_whatever_its_size() -> None:
    sizes = torch.logspace(-4, 2, 16)[:, None]
    layer = nn.Linear(64, 16, bias=False)
    layer.weight.data = torch.randn(16, 64) * sizes
    layer.weight.data[3] = 0.0
    layer.requires_grad_(False)
    narrow = fp8.NarrowLinear(layer)
    wide = narrow.widened()
    large = layer.weight.abs() > layer.weight.abs().amax(1, keepdim=True) / 256
    relative = ((wide - layer.weight) / layer.weight)[large].abs()
    assert float(relative.max()) <= 2**-4  # half of the last of three bits
    assert torch.equal(wide[3], torch.zeros(64))
    assert narrow.weight.dtype == torch.float8_e4m3fn


def test_widening_in_half_precision_is_exact() -> None:
    layer = nn.Linear(64, 16).to(torch.bfloat16)
    narrow = fp8.NarrowLinear(layer)
    wanted = narrow.weight.double() * narrow.scale.double()
    assert narrow.widened().dtype == torch.bfloat16
    assert torch.equal(narrow.widened().double(), wanted)


def test_nothing_wide_is_kept_for_the_backward_pass() -> None:
    narrow, _ = narrow_and_rounded()
    weights = {p.untyped_storage().data_ptr() for p in narrow.parameters()}
    shapes = {p.shape for p in narrow.parameters() if p.ndim >= 2 and p.numel() >= 1024}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(narrow, inputs()).sum().backward()
    assert kept
    assert not [t.shape for t in kept if t.shape in shapes or t.shape[::-1] in shapes]


def test_memory_is_half_of_bfloat16s_and_the_texts_key_values_are_copied_before(
    settings: Any,
) -> None:
    config = settings(model=EIGHT, optimiser={"precision": "bf16"})
    wide = load_unet(config.model.unet, dtype=torch.bfloat16, head_width=32).unet
    text = text_projections(wide)
    loaded = loop.prepare_unet(config, torch.device("cpu"))
    for path, (k, v) in text_projections(loaded.unet).items():
        assert torch.equal(k, text[path][0]) and torch.equal(v, text[path][1])
    fp8.narrow(loaded.unet, text=True)
    paths = {f"{layer.path}.attn2" for layer in unet_layers(wide)}
    assert len(paths) == train_world.LAYERS
    for path in paths:
        assert isinstance(loaded.unet.get_submodule(f"{path}.to_k"), fp8.NarrowLinear)

    def stored(unet: Any) -> int:
        blocks = (unet.down_blocks, unet.mid_block, unet.up_blocks)
        return sum(
            m.weight.numel() * m.weight.element_size()
            for block in blocks
            for m in block.modules()
            if isinstance(m, nn.Linear | nn.Conv2d | fp8.NarrowLinear | fp8.NarrowConv2d)
        )

    assert stored(loaded.unet) * 2 == stored(wide)


def test_the_dry_run_knows_what_it_saves(settings: Any) -> None:
    wide, narrow = settings(), settings(model=EIGHT)
    frozen = [estimate_memory(c, build_meta(c)).frozen for c in (wide, narrow)]
    outside = sum(
        p.numel() * p.element_size()
        for name, p in build_meta(wide).named_parameters()
        if name.partition(".")[0] not in ("down_blocks", "mid_block", "up_blocks")
    )
    # From float32's four bytes to one, but for norms and biases.
    assert (frozen[1] - outside) < 0.3 * (frozen[0] - outside)
    costs = [estimate_memory(c, build_meta(c)).cost for c in (wide, narrow)]
    assert costs[1].flops == pytest.approx(costs[0].flops, rel=0.02)
    assert "UNet" in dry_run(narrow)


def test_a_training_learns_resumes_exactly_and_writes_an_adapter(settings: Any) -> None:
    options = {"model": EIGHT, "run": {"steps": 4}, "checkpoints": {"every": 2}}
    whole = loop.train(settings("whole", **options))
    stopped = loop.train(settings("part", **{**options, "run": {"steps": 2}}))
    assert stopped.step == 2
    resumed = loop.train(settings("part", **options))
    assert train_world.bits(resumed.adapter)[0] == train_world.bits(whole.adapter)[0]
    plain = loop.train(settings("plain", run={"steps": 4}))
    ours, theirs = (read_adapter(o.adapter).state_dict() for o in (whole, plain))
    changed = [n for n, t in ours.items() if not torch.equal(t, theirs[n])]
    assert changed, "the UNet's rounding does not show: it was not used"
    for name, tensor in ours.items():  # the same way, on slightly other weights
        assert torch.allclose(tensor, theirs[name], atol=0.02), name


def test_another_storage_is_another_run(settings: Any) -> None:
    loop.train(settings(run={"steps": 1}))
    with pytest.raises(ResumeError, match=r"model\.unet_dtype"):
        loop.train(settings(run={"steps": 2}, model=EIGHT))
    assert loop.train(settings(run={"steps": 2}, model=EIGHT), changed=True).step == 2


def test_a_run_from_before_the_option_goes_on(settings: Any) -> None:
    loop.train(settings(run={"steps": 1}))
    folder = state.find_checkpoint(settings(run={"steps": 2}), "auto")
    assert folder is not None
    record = next(p for p in folder.iterdir() if p.suffix == ".json")
    text = record.read_text(encoding="utf-8")
    assert '"unet_dtype"' in text
    older = text.replace('"unet_dtype": "precision", ', "").replace(
        ', "unet_dtype": "precision"', ""
    )
    if older == text:  # indented
        lines = [line for line in text.splitlines() if "unet_dtype" not in line]
        older = "\n".join(lines).replace(",\n    }", "\n    }")
    record.write_text(older, encoding="utf-8")
    assert loop.train(settings(run={"steps": 2})).step == 2


def test_what_has_no_8_bit_floats_is_told(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(ConfigValueError, match=r"unet_dtype 'fp8' needs float8_e4m3fn.*precision"):
        dry_run(settings(model=EIGHT))


def test_other_words_are_refused() -> None:
    values = train_world.config(train_world.shared()).to_json()
    values["model"]["unet_dtype"] = "float8"
    with pytest.raises(ConfigValueError, match=r"model\.unet_dtype must be one of precision, fp8"):
        parse_config(values)
