"""A training step with the frozen UNet in 16 bits and in 8: seconds and memory, in turn.

    python benchmarks/unet_storage.py --size 1024 --batch 4

SDXL's shape with random weights, bfloat16 arithmetic, gradient checkpointing, AdamW: what
``trainer train`` does in a step, without its loader. Both storages in one process, pair by pair.
``--width`` narrows the UNet for a trial on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.trainer import sdxl_unet  # noqa: E402
from infinite_id_core.hosts.diffusers_train import identity_training  # noqa: E402
from infinite_id_core.hosts.diffusers_unet import unet_layers  # noqa: E402
from infinite_id_core.method.adapter import infinite_id_adapter  # noqa: E402
from infinite_id_core.method.records import AdapterConfig  # noqa: E402
from trainer.train import fp8  # noqa: E402
from trainer.train.objective import TrainingModel  # noqa: E402

DTYPE = torch.bfloat16
GIB = 2**30


def sdxl(width: int, device: torch.device) -> Any:
    """SDXL's UNet, ``width`` channels at its finest level (320), random weights, frozen."""
    with torch.device("meta"):
        unet = sdxl_unet(width)
    torch.nn.Module.to(unet, DTYPE)
    unet.to_empty(device=device)
    for parameter in unet.parameters():
        parameter.data.normal_(0, 0.02)
    unet.enable_gradient_checkpointing()
    return unet.train().requires_grad_(False)


class Side:
    """One storage of the UNet, its adapter and its optimiser; off the device while not timed."""

    def __init__(self, name: str, values: argparse.Namespace, device: torch.device) -> None:
        self.name, self.values, self.device = name, values, device
        self.unet = sdxl(values.width, device)
        if name == "fp8":
            fp8.narrow(self.unet, text=True)
        config = AdapterConfig(
            clip_width=1280, context_width=2048, recogniser="bench", clip_model="bench"
        )
        widths = {layer.path: layer.width for layer in unet_layers(self.unet)}
        with device:
            self.adapter = infinite_id_adapter(config, widths)
        fused = device.type == "cuda"
        self.optimiser = torch.optim.AdamW(self.adapter.parameters(), lr=1e-4, fused=fused)
        self.model = TrainingModel(self.adapter, self.unet, 1280)

    def step(self) -> None:
        """Forward, backward and update on random samples."""
        batch, side = self.values.batch, self.values.size // 8
        with self.device:
            sample = {
                "timestep": torch.randint(0, 1000, (batch,)),
                "size_ids": torch.full((batch, 6), float(self.values.size)),
                "face": torch.randn(batch, 512),
                "clip": torch.randn(batch, 257, 1280),
            }
            noisy, noise = torch.randn(2, batch, 4, side, side)
        with torch.autocast(self.device.type, DTYPE):
            output = self.model(noisy, sample)
        (output.float() - noise).square().mean().backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def measured(self) -> tuple[float, float]:
        """(seconds, GiB at the peak) of a step."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        with identity_training(self.unet, self.adapter):
            self.step()
        if cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        return time.perf_counter() - begun, peak / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=320, help="SDXL's is 320")
    values = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, list[float]] = {"bf16": [], "fp8": []}
    peaks: dict[str, float] = {}
    sides: dict[str, Side] = {}
    for name in found:  # each alone on the device, for its peak
        with contextlib.ExitStack() as stack:
            side = Side(name, values, device)
            stack.callback(torch.cuda.empty_cache)
            side.measured()
            peaks[name] = side.measured()[1]
            del side
    sides = {name: Side(name, values, device) for name in found}
    for side in sides.values():
        side.measured()
    for _ in range(values.pairs):
        for name, side in sides.items():
            found[name].append(side.measured()[0])
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"SDXL's shape, {values.size} px, batch {values.batch}, bf16, checkpointing, {where}")
    ratios = [b / a for a, b in zip(found["bf16"], found["fp8"], strict=True)]
    for name in found:
        middle = statistics.median(found[name])
        print(f"{name:6}{middle:9.3f} s a step {peaks[name]:9.2f} GiB at the peak")
    print(
        f"fp8 over bf16: {statistics.median(ratios):.3f} times the time "
        f"({min(ratios):.3f} to {max(ratios):.3f}), {peaks['fp8'] - peaks['bf16']:+.2f} GiB"
    )


if __name__ == "__main__":
    main()
