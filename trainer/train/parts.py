"""What a training is made of: the frozen UNet, the adapter that learns, its moving average."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from infinite_id_core.hosts.diffusers_unet import text_projections, unet_layers
from infinite_id_core.method.adapter import Adapter, infinite_id_adapter
from infinite_id_core.method.records import AdapterConfig
from infinite_id_core.sdxl.schedule import NoiseSchedule

from ..config import TrainConfig
from ..models.unet import LoadedUNet, load_unet
from .beginning import beginning
from .checks import DTYPES
from .fp8 import narrow


def prepare_unet(config: TrainConfig, device: torch.device) -> LoadedUNet:
    """The frozen UNet in its working precision, with the schedule the configuration asks for.

    Its text K/V are in the precision of the arithmetic, for ``new_adapter`` to copy.
    """
    model = config.model
    loaded = load_unet(
        model.unet, dtype=DTYPES[config.optimiser.precision], head_width=model.head_width
    )
    if model.unet_dtype == "fp8":
        narrow(loaded.unet)  # before it takes the device's memory
    loaded.unet.to(device)
    if config.optimiser.checkpointing:
        loaded.unet.enable_gradient_checkpointing()  # diffusers' default is non-reentrant
    return dataclasses.replace(loaded, schedule=schedule_of(config, loaded.schedule))


def schedule_of(config: TrainConfig, found: NoiseSchedule) -> NoiseSchedule:
    """The file's noise levels, or what the configuration says in their place."""
    model = config.model
    return NoiseSchedule(
        prediction=found.prediction if model.prediction == "auto" else model.prediction,
        zero_terminal_snr=found.zero_terminal_snr or model.zero_terminal_snr,
    )


def new_adapter(config: TrainConfig, recorded: AdapterConfig, unet: Any) -> Adapter:
    """The learning adapter at step 0: float32, K/V copied from the text's (3.2).

    With ``adapter.start_from`` another adapter's weights (``beginning``). Raises
    ``ModelMismatchError`` where they do not fit.
    """
    widths = {layer.path: layer.width for layer in unet_layers(unet)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        adapter = infinite_id_adapter(recorded, widths)
    if not config.adapter.start_from:
        adapter.copy_text_projections(text_projections(unet))
        return adapter
    begun = beginning(config.adapter.start_from, recorded, unet_layers(unet))
    adapter.load_state_dict({**adapter.state_dict(), **begun.tensors})
    return adapter


@torch.no_grad()
def follow(average: Adapter, adapter: Adapter, decay: float, step: int) -> None:
    """One step (counted from 1) of the moving average, quicker at the start."""
    share = 1.0 - min(decay, (1 + step) / (10 + step))
    pairs = zip(average.parameters(), adapter.parameters(), strict=True)
    for mean, value in pairs:
        mean.lerp_(value, share)
