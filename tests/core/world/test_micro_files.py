"""How the embedded tensors are stored: what goes in comes out."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from microworld import files


def test_zeros_at_the_end_are_left_out_and_come_back(tmp_path):
    wide = torch.zeros(8, 6, 3, 3)
    wide[:5, :2] = torch.randn(5, 2, 3, 3)
    state = {"wide": wide, "bias": torch.tensor([1.0, 0.0, 2.0, 0.0]), "nothing": torch.zeros(3, 4)}
    stored = files.trimmed(state)
    assert stored["wide"].shape == (5, 2, 3, 3) and stored["bias"].shape == (3,)
    save_file(stored, tmp_path / "file.safetensors")
    found = files.read_weights(tmp_path / "file.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_trimmed_and_quantised_is_off_by_half_a_step_at_most(tmp_path):
    wide = torch.zeros(64, 64)
    wide[:40, :50] = torch.randn(40, 50)
    save_file(files.quantise(files.trimmed({"w": wide})), tmp_path / "file.safetensors")
    found = files.read_weights(tmp_path / "file.safetensors")["w"]
    step = wide.abs().amax(1, keepdim=True) / 127
    assert bool(((found - wide).abs() <= step / 2 + 1e-6).all())


def test_the_committed_weights_stay_small():
    sizes = [path.stat().st_size for path in files.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 12_000_000
