"""The training run: set up, step, check, save, resume."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from infinite_id_core.errors import InfiniteIDError
from infinite_id_core.files.infinite_id_format import write_adapter
from infinite_id_core.hosts.diffusers_train import identity_training
from infinite_id_core.hosts.diffusers_unet import text_projections, unet_layers
from infinite_id_core.method.adapter import Adapter, infinite_id_adapter
from infinite_id_core.method.records import AdapterConfig
from infinite_id_core.packages import require
from infinite_id_core.sdxl.schedule import NoiseSchedule

from ..config import TrainConfig
from ..errors import NonFiniteError, RankLostError, disk_errors
from ..files import locked
from ..likeness import Recogniser
from ..models.text import TOKENS
from ..models.unet import LoadedUNet, load_unet
from . import state
from .checks import (
    DTYPES,
    adapter_to_start_from,
    check_data,
    check_device,
    check_held_out,
    check_models,
    check_run,
    check_validation,
)
from .features import compute_missing, fingerprints_of
from .fellows import Fellows
from .fp8 import narrow
from .log import RunLog, bar, logger, no_bar
from .memory import LESS_IN_CACHES, LESS_MEMORY, memory_errors
from .objective import Batch, Objective, TrainingModel
from .optimisers import build_optimiser, step_size
from .preview_sheet import Preview
from .previews import Previewer, scores
from .report import write_report
from .samples import Caches, Keys, Plan, Samples, Share, loader
from .validation import Validator
from .validation_set import ValidationPlan
from .workers import batches

INTERRUPTED = 143  # exit status after SIGTERM, as shells count it
Thing = TypeVar("Thing")
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
    recogniser: Recogniser | None = None,
) -> Outcome:
    """Run or resume a training.

    ``resume``: ``auto``, ``none`` or a checkpoint's folder. ``changed``: a checkpoint of other
    settings is gone on from, with its optimiser's state. ``recogniser`` scores previews in
    place of ``previews.face_models``. Raises named errors of data, files and configuration, and
    ``NonFiniteError``, ``ResumeError``, ``RankLostError``.
    """
    output = Path(config.run.output)
    with (
        _Processes(config) as processes,
        processes.losses_named(),
        processes.alone_in(output),
        disk_errors(output),
    ):
        return _Trainer(config, processes, resume, changed, recogniser).run()


def fill_caches(config: TrainConfig) -> bool:
    """Compute what training would cache before its first step; False if it was asked to stop.

    Neither the UNet nor what learns is loaded, and nothing of ``run.output`` is looked at. Raises
    what ``train`` raises of the data and of the models whose outputs are cached.
    """
    with _Processes(config) as processes, processes.losses_named():
        plan = check_data(config, 1)
        check_models(config)
        held_out, validation = check_held_out(config, 1), check_validation(config)
        keys = Keys(config=config, fingerprints=fingerprints_of(config))
        _fill(plan, held_out, validation, keys, Caches.below(config), processes)
        return not processes.any_stop()


def _fill(
    plan: Plan,
    held_out: Plan | None,
    validation: ValidationPlan | None,
    keys: Keys,
    caches: Caches,
    processes: _Processes,
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


# --- processes -------------------------------------------------------------------------------


class _Processes:
    """accelerate's view of this process among its fellows, and the signals they get."""

    def __init__(self, config: TrainConfig) -> None:
        accelerate = require("accelerate", "to train", "accelerate")
        check_device(config.run.device)
        # Autocast is the loop's own: the configuration alone decides, not the launcher.
        self.accelerator: Any = accelerate.Accelerator(
            mixed_precision="no", cpu=config.run.device == "cpu"
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.main = self.rank == 0
        self.stop = False
        self._folder = state.checkpoint_folder(config)
        self._before: dict[int, Any] = {}
        self._fellows = Fellows(self.rank) if self.world > 1 else None

    def __enter__(self) -> _Processes:
        for number in (signal.SIGTERM, signal.SIGINT):
            # Signals reach only the main thread; elsewhere the caller keeps its own.
            with contextlib.suppress(ValueError):
                self._before[number] = signal.signal(number, self._ask_to_stop)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._fellows is not None:
            if error is None:
                self._fellows.close()
            else:
                self._fellows.failed(error)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, number: int, _frame: FrameType | None) -> None:
        """Finish the step, save, end. A second Ctrl-C ends at once."""
        if number == signal.SIGINT and self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def any_stop(self) -> bool:
        """Whether any process was asked to stop; all of them call this together."""
        flag = torch.tensor([float(self.stop)], device=self.device)
        return bool(self.gather(flag).any())

    def gather(self, values: Tensor) -> Tensor:
        """``[n]`` of every process -> ``[world, n]``."""
        if self.world == 1:
            return values[None]
        gathered: Tensor = self.accelerator.gather(values[None])
        return gathered

    def gather_objects(self, things: list[Any]) -> list[Any]:
        """Lists of every process, one after another."""
        if self.world == 1:
            return things
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object(things)
        return gathered

    def from_main(self, thing: Any) -> Any:
        """The main process's ``thing`` on every process."""
        if self.world == 1:
            return thing
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([thing])[0]

    def agreed(self, do: Callable[[], Thing]) -> Thing:
        """What ``do`` gives on the main process; all get it, or the named error it raised."""
        found: Thing | InfiniteIDError | None = None
        if self.main:
            try:
                found = do()
            except InfiniteIDError as error:
                found = error
        found = self.from_main(found)
        if isinstance(found, InfiniteIDError):
            raise found
        return cast(Thing, found)

    @contextlib.contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Hold the folder for this run. Raises ``BusyError`` on every process."""
        with contextlib.ExitStack() as stack:
            self.agreed(lambda: stack.enter_context(locked(folder, "training")))
            yield

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def losses_named(self) -> Iterator[None]:
        """A fellow that is gone shows as an error of the communication library: name it."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            names = ("gloo", "NCCL", "Connection", "Socket", "peer")
            if self.world == 1 or not any(name in text for name in names):
                raise
            raise RankLostError(
                f"Another process of this run is gone ({text.splitlines()[0]}). Start all of them "
                f"again with the same command; {state.last_checkpoint(self._folder)}."
            ) from error


# --- the parts -------------------------------------------------------------------------------


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

    With ``adapter.start_from`` another adapter's weights. Raises ``ModelMismatchError`` where
    they do not fit.
    """
    widths = {layer.path: layer.width for layer in unet_layers(unet)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        adapter = infinite_id_adapter(recorded, widths)
    if not config.adapter.start_from:
        adapter.copy_text_projections(text_projections(unet))
        return adapter
    before = adapter_to_start_from(config.adapter.start_from, recorded, adapter.widths)
    adapter.load_state_dict(before.state_dict())
    return adapter


@torch.no_grad()
def follow(average: Adapter, adapter: Adapter, decay: float, step: int) -> None:
    """One step (counted from 1) of the moving average, quicker at the start."""
    share = 1.0 - min(decay, (1 + step) / (10 + step))
    pairs = zip(average.parameters(), adapter.parameters(), strict=True)
    for mean, value in pairs:
        mean.lerp_(value, share)


# --- the run ---------------------------------------------------------------------------------


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        processes: _Processes,
        resume: str,
        changed: bool,
        recogniser: Recogniser | None,
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
        self.first = self._load(start)
        if processes.main:
            write_report(config)
        _fill(self.plan, self.held_out, checked.validation, self.keys, self.caches, processes)
        self.previewer = self._previewer(checked.recogniser)
        self.validator = self._validator(checked.validation)
        self.objective = Objective(
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
            return 0
        before = state.read_record(start)
        changes = self.record.changes[len(before.changes) :]
        self.snapshot.load(start, self.processes.device, changed=bool(changes))
        if self.processes.main:
            logger.info("Going on from %s.", start)
            for change in changes:
                logger.warning(
                    "Going on with other settings, and the same state of the optimiser: %s.",
                    "; ".join(change["changed"]),
                )
        return before.step

    def _previewer(self, recogniser: Recogniser | None) -> Previewer | None:
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
        mine = self.previewer.make(self.loaded.unet, self.average or self.adapter, part)
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
