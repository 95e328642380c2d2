"""Caches, filled before the first step: each process its part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..config import TrainConfig
from .checks import check_data, check_held_out, check_models, check_validation
from .features import compute_missing, fingerprints_of
from .log import bar, no_bar
from .memory import LESS_IN_CACHES, memory_errors
from .processes import Processes
from .samples import Caches, Keys, Plan
from .validation_set import ValidationPlan


def fill_caches(config: TrainConfig) -> bool:
    """Compute what training would cache before its first step; False if it was asked to stop.

    Neither the UNet nor what learns is loaded, and nothing of ``run.output`` is looked at. Raises
    what ``train`` raises of the data and of the models whose outputs are cached.
    """
    with Processes(config) as processes, processes.losses_named():
        plan = check_data(config, 1)
        check_models(config)
        held_out, validation = check_held_out(config, 1), check_validation(config)
        keys = Keys(config=config, fingerprints=fingerprints_of(config))
        fill(plan, held_out, validation, keys, Caches.below(config), processes)
        return not processes.any_stop()


def fill(
    plan: Plan,
    held_out: Plan | None,
    validation: ValidationPlan | None,
    keys: Keys,
    caches: Caches,
    processes: Processes,
) -> None:
    """Fill the caches, each process its part; a stopped run does the rest when resumed."""

    def until_asked_to_stop(label: str, things: Iterable[Any], count: int) -> Iterator[Any]:
        shown = bar if processes.main else no_bar
        for thing in shown(label, things, count):
            yield thing
            if processes.stop:  # filling takes hours for many photos
                return

    with memory_errors("filling the caches", LESS_IN_CACHES):
        made = compute_missing(
            plan,
            keys,
            caches,
            processes.device,
            held_out=held_out,
            validation=validation,
            part=(processes.rank, processes.world),
            progress=until_asked_to_stop,
        )
    if made and processes.device.type == "cuda":
        torch.cuda.empty_cache()
    processes.wait()
    caches.refresh()
