"""The validation loss, and which weights had the best one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from infinite_id_core.hosts.diffusers_train import identity_training
from infinite_id_core.method.adapter import Adapter

from ..errors import ResumeError
from ..models.text import TOKENS
from ..models.unet import LoadedUNet
from .bands import band_name
from .cache import key_of
from .log import logger
from .objective import DenoisingLoss, TrainingModel
from .samples import Caches, Keys, Samples, collate
from .validation_set import ValidationPlan
from .workers import batches

Loss = tuple[int, float]
"""A sample's number and its loss."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a run's evaluations have come to; kept with every checkpoint."""

    of: str
    """A hash of everything that is evaluated on: losses on anything else are not compared."""
    last: int
    """Step of the last evaluation."""
    best: int | None = None
    """Step of the best one; None where none gave a number."""
    loss: float = math.inf
    """The best one's."""

    def after(self, step: int, loss: float) -> Standing:
        """With one more evaluation. The earlier of two equals stays the best."""
        better = math.isfinite(loss) and loss < self.loss
        best, least = (step, loss) if better else (self.best, self.loss)
        return Standing(of=self.of, last=step, best=best, loss=least)

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinity is none of JSON's."""
        return {**asdict(self), "loss": self.loss if self.best is not None else None}


def standing_of(values: Any) -> Standing:
    """What ``Standing.to_json`` gave. Raises ``ResumeError``."""
    try:
        best = values["best"]
        return Standing(
            of=str(values["of"]),
            last=int(values["last"]),
            best=None if best is None else int(best),
            loss=math.inf if best is None else float(values["loss"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"A checkpoint's record of validation is damaged ({error!r}).") from error


class Validator:
    """Evaluates weights, and remembers which were the best."""

    def __init__(
        self,
        plan: ValidationPlan,
        keys: Keys,
        caches: Caches,
        loaded: LoadedUNet,
        device: torch.device,
        before: dict[str, Any] | None,
    ) -> None:
        """``before``: the standing that a checkpoint recorded. Raises ``ResumeError``."""
        self.plan = plan
        self.loaded = loaded
        self.device = device
        self.samples = Samples(plan, keys, caches)
        self.objective = DenoisingLoss(loaded.schedule, 0.0, device)
        self.standing = Standing(of=self._asked(keys), last=-1)
        if before is not None:
            known = standing_of(before)
            if known.of == self.standing.of:
                self.standing = known
            else:
                logger.warning("Validation is on other samples than before: its best starts anew.")

    def due(self, step: int) -> bool:
        """Whether the weights after ``step`` are to be evaluated, and have not been yet."""
        config = self.plan.config
        wanted = step % config.validation.every == 0 or step == config.run.steps
        return wanted and step not in (0, self.standing.last)

    @torch.no_grad()
    def losses(
        self,
        adapter: Adapter,
        autocast: Callable[[], AbstractContextManager[Any]],
        part: tuple[int, int] = (0, 1),
    ) -> list[Loss]:
        """Plain squared errors of this process's samples. ``part``: (this process, how many).

        Raises subclasses of ``FileError`` for caches that cannot be read.
        """
        text_tokens = TOKENS if self.plan.config.objective.mode == "entangled" else 0
        model = TrainingModel(adapter, self.loaded.unet, self.loaded.pooled_width)
        found: list[Loss] = []
        with (
            identity_training(self.loaded.unet, adapter, text_tokens=text_tokens),
            batches(self._loader(part)) as read,
        ):
            for held in read:
                batch = {name: tensor.to(self.device) for name, tensor in held.items()}
                with autocast():
                    output = model(self.objective.noisy(batch), batch)
                _, plain = self.objective.losses(output, batch)
                found += zip(held["number"].tolist(), plain.cpu().tolist(), strict=True)
        return found

    def note(self, step: int, losses: Sequence[Loss]) -> dict[str, float]:
        """Take in all processes' losses of an evaluation; numbers for the log.

        ``all`` is the mean over all samples, of which every band has as many.
        """
        plan = self.plan
        by_band: list[list[float]] = [[] for _ in range(plan.bands)]
        for number, loss in sorted(losses):
            by_band[plan.band(number)].append(loss)
        means = [math.fsum(band) / len(band) for band in by_band]
        mean = math.fsum(means) / len(means)
        self.standing = self.standing.after(step, mean)
        numbers = {"validation/all": mean}
        for band, value in enumerate(means):
            numbers[f"validation/{band_name(band, plan.bands)}"] = value
        return numbers

    def _loader(self, part: tuple[int, int]) -> Any:
        rank, world = part
        chosen = self.plan.batches(self.plan.config.optimiser.batch)[rank::world]
        return torch.utils.data.DataLoader(
            self.samples, batch_sampler=_Listed(chosen), collate_fn=collate
        )

    def _asked(self, keys: Keys) -> str:
        """A hash of what the samples are, whatever led to them."""
        plan, config = self.plan, self.plan.config
        samples = []
        for choice in map(plan.choice, range(len(plan))):
            target, reference = (plan.dataset.row(n) for n in (choice.target, choice.reference))
            latent = keys.latent(target, plan.crop(choice.target, choice.crop))
            samples.append((latent, keys.clip(reference), choice.timestep))
        objective, schedule = config.objective, self.loaded.schedule
        stored = config.model.unet_dtype
        return key_of(
            *([] if stored == "precision" else [stored]),  # as it was before there was a choice
            samples, config.validation.seed, config.encoder.embedding, objective.mode,
            objective.pooled, schedule.prediction, schedule.zero_terminal_snr,
        )  # fmt: skip


class _Listed(torch.utils.data.Sampler[list[int]]):
    """Batches as they are listed."""

    def __init__(self, listed: Sequence[list[int]]) -> None:
        self.listed = listed

    def __iter__(self) -> Any:
        return iter(self.listed)

    def __len__(self) -> int:
        return len(self.listed)
