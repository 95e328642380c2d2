"""The training run: set up, step, check, save, resume."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infinite_id_core.files.infinite_id_format import write_adapter
from infinite_id_core.hosts.diffusers_train import identity_training
from infinite_id_core.scores.score import FaceReader

from ..config import TrainConfig
from ..errors import NonFiniteError, disk_errors
from ..models.text import TOKENS
from . import state
from .checks import DTYPES, check_run
from .filling import fill
from .fp8 import narrow
from .log import RunLog, logger
from .memory import LESS_MEMORY, memory_errors
from .objective import Batch, DenoisingLoss, TrainingModel
from .optimisers import build_optimiser, step_size
from .parts import follow, new_adapter, prepare_unet
from .preview_sheet import Preview
from .previews import Previewer, scores
from .processes import Processes
from .report import write_report
from .samples import Caches, Keys, Samples, Share, loader
from .validation import Validator
from .validation_set import ValidationPlan
from .workers import batches

INTERRUPTED = 143  # exit status after SIGTERM, as shells count it
_SMALLEST_SCALE = 1.0  # of fp16's loss: below, something other than its range is wrong


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    step: int
    finished: bool
    """False after SIGTERM."""
    adapter: Path | None
    """The finished file; None where the run was interrupted."""


def train(
    config: TrainConfig,
    resume: str = "auto",
    *,
    changed: bool = False,
    recogniser: FaceReader | None = None,
) -> Outcome:
    """Run or resume a training.

    ``resume``: ``auto``, ``none`` or a checkpoint's folder. ``changed``: a checkpoint of other
    settings is gone on from, with its optimiser's state. ``recogniser`` scores previews in
    place of ``previews.face_models``. Raises named errors of data, files and configuration, and
    ``NonFiniteError``, ``ResumeError``, ``RankLostError``.
    """
    output = Path(config.run.output)
    with (
        Processes(config) as processes,
        processes.losses_named(),
        processes.alone_in(output),
        disk_errors(output),
    ):
        with memory_errors("loading the models and the optimiser", LESS_MEMORY):
            trainer = _Trainer(config, processes, resume, changed, recogniser)
        return trainer.run()


# --- the run ---------------------------------------------------------------------------------


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        resume: str,
        changed: bool,
        recogniser: FaceReader | None,
    ) -> None:
        self.config = config
        self.processes = processes
        self.folder = state.checkpoint_folder(config)
        options = config.optimiser
        self.share = Share(
            batch=options.batch,
            accumulation=options.accumulation,
            rank=processes.rank,
            world=processes.world,
        )
        # Everything that can be wrong is looked at before anything long starts.
        start = self._start(resume)
        checked = check_run(
            config,
            start,
            self.share.global_batch,
            world=processes.world,
            changed=changed,
            recogniser=recogniser,
        )
        self.plan, self.held_out, self.record = checked.plan, checked.held_out, checked.record
        self.keys = Keys(config=config, fingerprints=checked.fingerprints)
        self.caches = Caches.below(config)
        self.loaded = prepare_unet(config, processes.device)
        self.adapter = new_adapter(config, checked.recorded, self.loaded.unet).to(processes.device)
        if config.model.unet_dtype == "fp8":
            narrow(self.loaded.unet, text=True)  # nobody copies them any more
        self.average = copy.deepcopy(self.adapter) if options.ema else None
        self.parameters = list(self.adapter.parameters())
        self.optimiser = build_optimiser(options, self.parameters, processes.device)
        # The scaler of fp16 is ours: accelerate's would skip steps without saying so.
        self.scaler = _scaler(processes.device) if options.precision == "fp16" else None
        self.snapshot = state.Snapshot(
            adapter=self.adapter,
            optimiser=self.optimiser,
            average=self.average,
            scaler=self.scaler,
        )
        self.checked = checked
        self.first = self._load(start)
        self.previewer: Previewer | None = None
        self.validator: Validator | None = None
        self.objective = DenoisingLoss(
            self.loaded.schedule,
            config.objective.min_snr,
            processes.device,
            config.objective.face_weight,
        )

    def _start(self, resume: str) -> Path | None:
        """Every process starts from the checkpoint that the main one chose, or fails as it did."""
        return self.processes.agreed(lambda: state.find_checkpoint(self.config, resume))

    def _load(self, start: Path | None) -> int:
        if start is None:
            if self.checked.begun and self.processes.main:
                logger.info("It starts from %s.", self.checked.begun)
            return 0
        before = state.read_record(start)
        changes = self.record.changes[len(before.changes) :]
        self.snapshot.load(start, self.processes.device, changed=bool(changes))
        if self.processes.main:
            steps = self.config.run.steps
            if before.step >= steps:
                logger.info("Already at step %d of %d (%s).", before.step, steps, start)
            else:
                logger.info("Going on from %s.", start)
            for change in changes:
                logger.warning(
                    "Going on with other settings, and the same state of the optimiser: %s.",
                    "; ".join(change["changed"]),
                )
        return before.step

    def _prepare(self) -> None:
        """What may take hours before the first step: the caches; and who looks at the steps."""
        checked = self.checked
        if self.processes.main:
            write_report(self.config)
        fill(self.plan, self.held_out, checked.validation, self.keys, self.caches, self.processes)
        self.previewer = self._previewer(checked.recogniser)
        self.validator = self._validator(checked.validation)

    def _previewer(self, recogniser: FaceReader | None) -> Previewer | None:
        if self.held_out is None:
            return None
        return Previewer(
            self.held_out,
            self.keys,
            self.caches,
            self.loaded,
            self.processes.device,
            recogniser,
        )

    def _validator(self, plan: ValidationPlan | None) -> Validator | None:
        if plan is None:
            return None
        device, before = self.processes.device, self.record.validated
        return Validator(plan, self.keys, self.caches, self.loaded, device, before)

    # --- stepping ---

    def run(self) -> Outcome:
        config, processes = self.config, self.processes
        self._prepare()
        unwrapped = TrainingModel(self.adapter, self.loaded.unet, self.loaded.pooled_width)
        self.model = processes.accelerator.prepare_model(unwrapped)
        steps, step = config.run.steps, self.first
        samples = Samples(self.plan, self.keys, self.caches)
        reading = batches(loader(samples, self.share, step, steps, config.data.workers))
        text_tokens = TOKENS if config.objective.mode == "entangled" else 0
        log = RunLog(config, step, main=processes.main)
        stopped = processes.any_stop()
        try:
            with (
                identity_training(self.loaded.unet, self.adapter, text_tokens=text_tokens),
                reading as read,
                memory_errors("training", LESS_MEMORY),
            ):
                if not stopped and self._validate(step, log):
                    self._save(step)  # it stopped before it came to that
                while step < steps and not stopped:
                    stopped = self._step(step, read, log)
                    step += 1
                    with log.aside():
                        self._after(step, stopped, log)
        finally:
            log.close()
        if step < steps:
            return Outcome(step=step, finished=False, adapter=None)
        return Outcome(step=step, finished=True, adapter=self._finish(step))

    def _step(self, step: int, read: Iterator[Batch], log: RunLog) -> bool:
        """One optimiser step. Returns whether any process was asked to stop."""
        options = self.config.optimiser
        rate = options.rate_at(step, self.config.run.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        losses, timesteps = [], []
        for micro in range(options.accumulation):
            batch = self._on_device(next(read))
            last = micro == options.accumulation - 1
            # Gradients are summed over processes once, with the last pass.
            quiet = contextlib.nullcontext() if last else self._no_sync()
            with quiet:
                with self._autocast():
                    output = self.model(self.objective.noisy(batch), batch)
                weighted, plain = self.objective.losses(output, batch)
                loss: Any = weighted.mean() / options.accumulation
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            losses.append(plain)
            timesteps.append(batch["timestep"])
        mine = torch.cat([*losses, *timesteps, torch.tensor([float(self.processes.stop)]).to(loss)])
        everything = self.processes.gather(mine).cpu()
        count = self.share.batch * options.accumulation
        all_losses, all_times = everything[:, :count], everything[:, count : 2 * count]
        self._check_losses(step, all_losses)
        norm = self._update(step)
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            follow(self.average, self.adapter, options.ema, step + 1)
        taken = step_size(self.optimiser, rate)
        log.step(step + 1, all_losses.flatten(), all_times.flatten(), norm, taken)
        return bool(everything[:, -1].any())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision, device = self.config.optimiser.precision, self.processes.device.type
        return torch.autocast(device, DTYPES[precision], enabled=precision != "fp32")

    def _no_sync(self) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(self.model, "no_sync", None)  # only a parallel model has it
        return no_sync() if no_sync else contextlib.nullcontext()

    def _on_device(self, batch: Batch) -> Batch:
        device = self.processes.device
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def _update(self, step: int) -> float:
        """Check the norm, then step. Returns the norm before it was scaled down."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimiser)
        limit = self.config.optimiser.clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if self.scaler is None:
            if not _finite(norm):
                self._refuse(step, f"the gradient norm is {norm}", range(self.share.global_batch))
            self.optimiser.step()
            return norm
        # fp16 overflows now and then; its scale falls and the step is left out, on every process.
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.scaler.get_scale() < _SMALLEST_SCALE:
            self._refuse(step, "fp16's loss scale has vanished", range(self.share.global_batch))
        return norm

    def _check_losses(self, step: int, losses: Tensor) -> None:
        """``losses``: ``[world, batch * accumulation]``; equal on every process."""
        batch, world = self.share.batch, self.share.world
        bad = [
            (column // batch) * world * batch + rank * batch + column % batch
            for rank, column in torch.nonzero(~losses.isfinite()).tolist()
        ]
        if bad:
            self._refuse(step, f"the loss of {len(bad)} samples is not a number", bad)

    def _refuse(self, step: int, problem: str, places: Any) -> None:
        """Stop before the step; ``places`` within the step's samples."""
        first = step * self.share.global_batch
        chosen = sorted(places)[:8]
        names = [self.plan.choice(first + n).describe(self.plan.dataset) for n in chosen]
        more = f" and {len(places) - 8} more" if len(places) > 8 else ""
        raise NonFiniteError(
            f"Step {step + 1}: {problem}. No step was made; {self._last_checkpoint()}. Samples: "
            f"{'; '.join(names)}{more}. Look at these photos, lower optimiser.rate, or use "
            "optimiser.precision 'bf16' or 'fp32'."
        )

    # --- between steps ---

    def _after(self, step: int, stopped: bool, log: RunLog) -> None:
        config = self.config
        best = False
        if not stopped or step == config.run.steps:
            best = self._validate(step, log) and self._is_best(step)
        if stopped or best or step % config.checkpoints.every == 0 or step == config.run.steps:
            self._save(step)
        due = config.previews.every and step % config.previews.every == 0
        if self.previewer is not None and due and not stopped:
            self._preview(step, log)

    def _validate(self, step: int, log: RunLog) -> bool:
        """Evaluate the weights if it is time to. Returns whether that was done."""
        if self.validator is None or not self.validator.due(step):
            return False
        part = (self.processes.rank, self.processes.world)
        adapter = self.average or self.adapter
        mine = self.validator.losses(adapter, self._autocast, part)
        numbers = self.validator.note(step, self.processes.gather_objects(mine))
        log.validated(step, numbers, best=self._is_best(step))
        if self._is_best(step):
            self._write("best.safetensors", step)
        return True

    def _is_best(self, step: int) -> bool:
        return self.validator is not None and self.validator.standing.best == step

    def _preview(self, step: int, log: RunLog) -> None:
        assert self.previewer is not None
        part = (self.processes.rank, self.processes.world)
        mine = self.previewer.make(self.average or self.adapter, part)
        previews: list[Preview] = self.processes.gather_objects(mine)
        log.pictures(step, [p.name for p in previews], [p.picture for p in previews])
        if self.processes.main:
            log.pictures(step, ["sheet"], [self.previewer.write_sheet(step, previews)])
        if self.previewer.recogniser is not None:
            log.scalars(step, scores(previews))

    def _save(self, step: int) -> None:
        for adapter in (self.adapter, self.average):
            if adapter is not None:
                adapter.config = dataclasses.replace(adapter.config, training_step=step)
        if self.processes.main:
            if self.validator is not None:
                validated = self.validator.standing.to_json()
                self.record = dataclasses.replace(self.record, validated=validated)
            state.save(self.folder, dataclasses.replace(self.record, step=step), self.snapshot)
            best = (self.record.validated or {}).get("best")
            state.keep_last(self.folder, self.config.checkpoints.keep, best)
        self.processes.wait()

    def _finish(self, step: int) -> Path:
        return self._write("adapter.safetensors", step)

    def _write(self, name: str, step: int) -> Path:
        """Write the weights for use, as they are after ``step``."""
        path = Path(self.config.run.output) / name
        chosen = self.average or self.adapter
        chosen.config = dataclasses.replace(chosen.config, training_step=step)
        if self.processes.main:
            write_adapter(path, chosen, DTYPES[self.config.run.dtype])
        self.processes.wait()
        return path

    def _last_checkpoint(self) -> str:
        return state.last_checkpoint(self.folder)


def _scaler(device: torch.device) -> Any:
    amp: Any = torch.amp
    return amp.GradScaler(device.type)


def _finite(value: float) -> bool:
    return value - value == 0.0
