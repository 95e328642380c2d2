"""``train --dry-run``: everything looked at, nothing started; memory, disk and time foretold.

One forward and backward pass runs on torch's meta device, where tensors have shapes and no
contents: it counts the arithmetic and the bytes kept for the backward pass for any UNet in
seconds, without its weights. What one device then makes of the arithmetic is measured by a
matrix product.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from infinite_id_core.hosts.diffusers_train import identity_training
from infinite_id_core.hosts.diffusers_unet import unet_layers
from infinite_id_core.method.adapter import Adapter, infinite_id_adapter
from infinite_id_core.method.face_clip import CLIP_TOKENS
from infinite_id_core.method.records import AdapterConfig

from ..config import TrainConfig
from ..data_index import Dataset
from ..errors import BusyError, DiskFullError
from ..files import is_locked
from ..models.image_encoder import clip_width
from ..models.text import TOKENS
from . import state as checkpoint
from .checks import DTYPES, check_device, check_run
from .memory import LESS_MEMORY
from .objective import TrainingModel
from .optimisers import state_bytes
from .report import photos_in_bars
from .samples import LATENT_CHANNELS, LATENT_STRIDE

_EFFICIENCY = 0.5  # of a matrix product's rate: what a UNet's mixed work reaches, roughly
_SLACK = 1.15  # allocator, libraries, kernels' workspace
_GIB = 2**30
_LOW = (functional.linear, functional.conv2d)
_HIGH = (functional.layer_norm, functional.group_norm)


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """One forward and backward pass."""

    flops: float
    kept: int
    """Bytes that wait for the backward pass."""
    recomputed: int
    """With checkpointing: bytes of the largest block while it is computed again."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take on each device."""

    frozen: int
    """Bytes of the UNet."""
    learning: int
    """Bytes of float32 weights, gradients, ``state``, average and low-precision copies."""
    state: int
    """Bytes of the optimiser's state."""
    activations: int
    cost: PassCost
    parameters: int
    """How many numbers learn."""

    @property
    def memory(self) -> int:
        """Bytes at the peak, with some slack."""
        return round((self.frozen + self.learning + self.activations) * _SLACK)


# --- checking --------------------------------------------------------------------------------


def dry_run(config: TrainConfig, resume: str = "auto", changed: bool = False) -> str:
    """Check all that a run would meet and say what it will take.

    Raises the same named errors that the run would, and ``DiskFullError`` where caches and
    checkpoints will not fit.
    """
    start = checkpoint.find_checkpoint(config, resume)
    options = config.optimiser
    checked = check_run(config, start, options.batch * options.accumulation, changed=changed)
    plan, dataset, unet = checked.plan, checked.plan.dataset, checked.unet
    if is_locked(Path(config.run.output)):
        raise BusyError(config.run.output, "a training is writing to this folder just now.")
    first = checkpoint.read_record(start).step if start else 0
    estimate = estimate_memory(config, unet)
    disk = _check_disk(config, dataset, estimate)
    device = check_device(config.run.device)
    seconds = estimate.cost.flops * options.accumulation / _rate(device, config)
    steps = config.run.steps - first
    pairs = sum(bool(dataset.pairs_of(name)) for name in dataset.identities[:200])
    looked = min(200, len(dataset.identities))
    lines = [
        f"data        {len(dataset)} photos of {len(dataset.identities)} people; "
        f"{pairs} of {looked} looked at have pairs; target sizes: {len(plan.buckets)}",
        f"base        {config.model.unet}: {len(unet_layers(unet))} cross-attention layers, "
        f"{_millions(unet)} M parameters, frozen",
        f"learning    {estimate.parameters / 1e6:.1f} M parameters"
        + (f"; it starts from {checked.begun}" if checked.begun else ""),
        f"steps       {steps} of {config.run.steps}, {plan.global_batch} samples each per process"
        + (f", going on from {start}" if start else ""),
        f"memory      {estimate.memory / _GIB:.2f} GiB on each device: UNet "
        f"{estimate.frozen / _GIB:.2f}, learning {estimate.learning / _GIB:.2f}, activations "
        f"{estimate.activations / _GIB:.2f}{_fits(device, estimate)}",
        f"disk        {disk / _GIB:.2f} GiB for caches and checkpoints",
        f"time        about {_duration(seconds)} a step and {_duration(seconds * steps)} in all on "
        f"this device ({device.type}), after the caches are filled",
    ]
    return "\n".join([*lines, "", photos_in_bars(config)])


def _check_disk(config: TrainConfig, dataset: Dataset, estimate: Estimate) -> int:
    """Bytes that caches and checkpoints will need. Raises ``DiskFullError``."""
    data = config.data
    latent = LATENT_CHANNELS * (data.resolution // LATENT_STRIDE) ** 2
    features = data.crops_per_photo * latent + CLIP_TOKENS * clip_width(config.encoder.clip_model)
    caches = 2 * features * len(dataset)
    weights = 4 * estimate.parameters * (1 + bool(config.optimiser.ema))
    kept = config.checkpoints.keep + 1 + bool(config.validation.every)
    checkpoints = (weights + estimate.state) * kept
    for folder, needed in ((data.cache_folder, caches), (Path(config.run.output), checkpoints)):
        place = next(p for p in (folder, *folder.resolve().parents) if p.is_dir())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise DiskFullError(
                folder,
                f"needs up to {needed / _GIB:.1f} GiB and the disk has {free / _GIB:.1f} GiB "
                "free. Choose another disk, fewer data.crops_per_photo or checkpoints.keep.",
            )
    return caches + checkpoints


# --- memory and arithmetic -------------------------------------------------------------------


def estimate_memory(config: TrainConfig, unet: Any) -> Estimate:
    """Of a run with ``unet`` on the meta device."""
    options = config.optimiser
    recorded = AdapterConfig(
        clip_width=clip_width(config.encoder.clip_model),
        context_width=unet.config.cross_attention_dim,
        recogniser="any",
        clip_model="any",
        face_tokens=config.adapter.face_tokens,
    )
    with torch.device("meta"):
        adapter = infinite_id_adapter(
            recorded, {layer.path: layer.width for layer in unet_layers(unet)}
        )
    parameters = sum(p.numel() for p in adapter.parameters())
    state = state_bytes(options.kind, adapter.parameters())
    copies = 0 if options.precision == "fp32" else 2
    per_number = 4 + 4 + (4 if options.ema else 0) + copies
    cost = measure_pass(
        unet,
        adapter,
        batch=options.batch,
        resolution=config.data.resolution,
        checkpointing=options.checkpointing,
        text_tokens=TOKENS if config.objective.mode == "entangled" else 0,
    )
    return Estimate(
        frozen=sum(p.numel() * p.element_size() for p in unet.parameters()),
        learning=parameters * per_number + state,
        state=state,
        activations=cost.kept + cost.recomputed,
        cost=cost,
        parameters=parameters,
    )


def measure_pass(
    unet: Any,
    adapter: Adapter,
    *,
    batch: int,
    resolution: int,
    checkpointing: bool = False,
    text_tokens: int = 0,
) -> PassCost:
    """Count one forward and backward pass; ``unet`` and ``adapter`` are on one device."""
    config, like = unet.config, unet.conv_in.weight
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    side = resolution // LATENT_STRIDE
    device = like.device
    sample = {
        "timestep": torch.zeros(batch, dtype=torch.long, device=device),
        "size_ids": torch.zeros(batch, 6, device=device),
    }
    for name, reading in adapter.needs.items():
        sample[name] = torch.zeros(batch, *reading.shape, device=device)
    if text_tokens:
        width = adapter.config.context_width
        sample["context"] = torch.zeros(batch, text_tokens, width, device=device)
        sample["pooled"] = torch.zeros(batch, pooled, device=device)
    noisy = torch.zeros(batch, LATENT_CHANNELS, side, side, device=device)
    model = TrainingModel(adapter, unet, pooled)
    frozen = {_storage(p) for p in (*unet.parameters(), *adapter.parameters())}
    outer, largest = _Meter(frozen), 0

    def checkpointed(module: Callable[..., Any], *inputs: Any) -> Any:
        nonlocal largest
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                outer.keep(tensor)
        inner = _Meter(frozen)
        with saved_tensors_hooks(inner.keep, _give):
            result = module(*inputs)
        largest = max(largest, inner.bytes)
        return result

    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(identity_training(unet, adapter, text_tokens=text_tokens))
        attention = stack.enter_context(_Autocast(like.dtype))
        if checkpointing:
            unet.enable_gradient_checkpointing(checkpointed)
            stack.callback(unet.disable_gradient_checkpointing)
        with counter:
            with saved_tensors_hooks(outer.keep, _give):
                loss: Any = model(noisy, sample).float().square().mean()
            loss.backward()
    # A checkpointed pass runs its blocks forward once more.
    total = counter.get_total_flops() + attention.flops
    forward = (total / 2) if checkpointing else 0.0
    return PassCost(flops=total + forward, kept=outer.bytes, recomputed=largest)


class _Meter:
    """Bytes of distinct tensors that autograd keeps; weights are counted elsewhere."""

    def __init__(self, frozen: set[int]) -> None:
        self.seen = set(frozen)
        self.held: list[Tensor] = []  # a freed storage's address would be given out again
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor, once."""
        place = _storage(tensor)
        if place not in self.seen:
            self.seen.add(place)
            self.held.append(tensor.detach())
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return int(storage._cdata)


def _give(tensor: Tensor) -> Tensor:
    return tensor


class _Autocast(TorchFunctionMode):
    """Autocast's casts and a flash attention, neither of which the meta device has."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.low = low
        self.flops = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            q, k, v = (x.to(self.low) for x in args[:3])
            products = 2.0 * q.numel() * k.shape[-2]
            # Two products forward; four, and the scores again, backward.
            self.flops += products * (2 + 5)
            apply: Any = _FlashAttention.apply
            return apply(q, k, v)
        if func in _LOW or func in _HIGH:
            dtype = self.low if func in _LOW else torch.float32
            args = tuple(_cast(x, dtype) for x in args)
            kwargs = {name: _cast(x, dtype) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _FlashAttention(torch.autograd.Function):
    """Shapes and kept tensors of fused attention; no contents."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# --- this device -----------------------------------------------------------------------------


def _rate(device: torch.device, config: TrainConfig) -> float:
    """Useful floating-point operations a second, from a matrix product on the device."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=DTYPES[config.optimiser.precision])
    product = a @ a  # the first call starts the libraries
    _finish(device)
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.3:
        product = a @ a
        _finish(device)
        rounds += 1
    del product
    return _EFFICIENCY * rounds * 2.0 * size**3 / (time.perf_counter() - started)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _fits(device: torch.device, estimate: Estimate) -> str:
    if device.type != "cuda":
        return ""
    there = int(torch.cuda.get_device_properties(device).total_memory)
    if estimate.memory <= there:
        return f" (it has {there / _GIB:.1f})"
    return f". It has only {there / _GIB:.1f}: {LESS_MEMORY}"


def _millions(unet: Any) -> int:
    numbers: int = sum(p.numel() for p in unet.parameters())
    return round(numbers / 1e6)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} seconds"
