"""The validation loss: always on the same samples, and what it decides."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infinite_id_core.files.adapters import read_adapter
from trainer.config import TrainConfig
from trainer.data_index import Dataset
from trainer.errors import FilterError, ResumeError, TooFewPeopleError
from trainer.train import checks, filling, log, loop, state
from trainer.train.bands import band_name, band_range
from trainer.train.checks import check_validation
from trainer.train.estimate import dry_run
from trainer.train.scalars import ScalarFile
from trainer.train.validation import Standing, Validator, standing_of
from trainer.train.validation_set import ValidationPlan

from .. import train_world

Make = Callable[..., TrainConfig]
OPTIONS = {"every": 2, "people": 2, "pairs": 3, "bands": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, three held out."""
    return train_world.world(tmp_path_factory.mktemp("world"), held_out=3)


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Make:
    def settings(name: str = "run", **sections: Any) -> TrainConfig:
        run = {"output": str(tmp_path / name), "steps": 6, **sections.pop("run", {})}
        validation = {**OPTIONS, **sections.pop("validation", {})}
        return train_world.config(root, run=run, validation=validation, **sections)

    return settings


def plan_of(config: TrainConfig) -> ValidationPlan:
    plan = check_validation(config)
    assert plan is not None
    return plan


def evaluations(output: Path) -> dict[int, dict[str, str]]:
    """Texts of the numbers, as ``scalars.csv`` has them: equal texts are equal bits."""
    found: dict[int, dict[str, str]] = {}
    for line in (output / "scalars.csv").read_text(encoding="utf-8").splitlines()[1:]:
        step, name, value = line.split(",")
        if name.startswith("validation/"):
            assert name not in found.setdefault(int(step), {})
            found[int(step)][name] = value
    return found


def ended(output: Path) -> Any:
    """What must not depend on how often a run was broken off."""
    last = state.checkpoints(output / "checkpoints")[-1]
    return (
        train_world.bits(output / "adapter.safetensors"),
        train_world.bits(output / "best.safetensors"),
        evaluations(output),
        state.read_record(last).validated,
        [path.name for path in state.checkpoints(output / "checkpoints")],
    )


def losses_in_turn(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Evaluations come out like this, one after another."""
    turns = iter(values)

    def losses(self: Validator, *_: Any) -> list[tuple[int, float]]:
        value = next(turns)
        return [(number, value) for number in range(len(self.plan))]

    monkeypatch.setattr(Validator, "losses", losses)


# --- which samples ---------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7, 1000])
def test_bands_are_the_logs(bands: int) -> None:
    timesteps = [t for band in range(bands) for t in band_range(band, bands)]
    assert timesteps == list(range(1000))
    for band in range(bands):
        assert {t * bands // 1000 for t in band_range(band, bands)} == {band}
    assert band_name(3, 4) == "timesteps_750_to_999"


def test_samples_are_held_out_people_and_every_pair_is_in_every_band(make: Make) -> None:
    plan = plan_of(make())
    choices = [plan.choice(number) for number in range(len(plan))]
    assert len(choices) == 2 * 3 * 2
    assert {choice.identity for choice in choices} == {"person 3", "person 4"}
    assert len({(choice.reference, choice.target) for choice in choices}) == 6
    for first, second in zip(choices[::2], choices[1::2], strict=True):
        assert (first.reference, first.target) == (second.reference, second.target)
        assert first.timestep < 500 <= second.timestep
        assert not torch.equal(plan.noise(first.number), plan.noise(second.number))
    assert not any(choice.drop_identity or choice.drop_text for choice in choices)
    assert len({choice.timestep for choice in choices}) > 6


def test_samples_follow_from_their_own_seed(make: Make) -> None:
    def drawn(**sections: Any) -> list[Any]:
        plan = plan_of(make(**sections))
        return [
            (plan.choice(n), plan.crop(plan.choice(n).target, 0), plan.noise(n).tolist())
            for n in range(len(plan))
        ]

    same = drawn()
    assert drawn(run={"seed": 8}, objective={"noise_offset": 0.5, "drop_identity": 1.0}) == same
    assert drawn(validation={"seed": 1}) != same


def test_batches_hold_one_bucket_and_every_sample_once(make: Make) -> None:
    plan = plan_of(make())
    batches = plan.batches(4)
    assert sorted(n for batch in batches for n in batch) == list(range(len(plan)))
    assert max(map(len, batches)) == 4
    for batch in batches:
        assert len({plan.noise(number).shape for number in batch}) == 1


def test_a_person_without_pairs_is_passed_over(make: Make, monkeypatch: Any) -> None:
    known = Dataset.pairs_of
    monkeypatch.setattr(
        Dataset, "pairs_of", lambda self, name: () if name == "person 3" else known(self, name)
    )
    assert {name for name, _, _ in plan_of(make()).pairs} == {"person 4", "person 5"}


# --- too few ---------------------------------------------------------------------------------


def refused(config: TrainConfig, kind: type[Exception], message: str, patch: Any) -> None:
    """The dry run and the run raise the same, and the run has loaded nothing by then."""

    def explode(*_: Any) -> None:
        raise AssertionError("something was loaded")

    with pytest.raises(kind, match=message):
        dry_run(config)
    with patch.context() as patched, pytest.raises(kind, match=message):
        patched.setattr(loop, "prepare_unet", explode)
        loop.train(config)
    with pytest.raises(kind, match=message):
        filling.fill_caches(config)


def test_too_few_held_out_people(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(validation={"people": 4})
    message = r"validation\.people is 4.*of 3 people .* 3 have.*--held-out.*validation\.people = 3"
    refused(config, TooFewPeopleError, message, monkeypatch)


def test_nobody_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = train_world.world(tmp_path, held_out=0)
    config = train_world.config(root, validation=OPTIONS)
    message = r"nobody is held out.*--held-out.*validation\.every = 0"
    refused(config, FilterError, message, monkeypatch)


# --- a run -----------------------------------------------------------------------------------


def test_the_weights_do_not_depend_on_it(make: Make) -> None:
    with_it = loop.train(make("with", optimiser={"ema": 0.5}))
    without = loop.train(make("without", optimiser={"ema": 0.5}, validation={"every": 0}))
    assert train_world.bits(with_it.adapter) == train_world.bits(without.adapter)
    assert not (without.adapter.parent / "best.safetensors").exists()


def test_it_is_reported_by_band_beside_the_training_loss(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO")
    for steps in (4, 6):  # resumed, it loses none
        loop.train(make(run={"steps": steps}, log={"trackers": ["tensorboard"], "every": 2}))
    names = {f"validation/{name}" for name in ("all", band_name(0, 2), band_name(1, 2))}
    written = evaluations(tmp_path / "run")
    assert list(written) == [2, 4, 6]
    assert all(set(numbers) == names for numbers in written.values())
    for numbers in written.values():
        values = {name: float(value) for name, value in numbers.items()}
        bands = [values[name] for name in names - {"validation/all"}]
        assert values["validation/all"] == pytest.approx(sum(bands) / 2)
    assert "2,loss/all," in (tmp_path / "run" / "scalars.csv").read_text(encoding="utf-8")
    assert "Step 4: validation" in caplog.text
    found = EventAccumulator(str(tmp_path / "run" / "logs"))
    found.Reload()
    assert names | {"loss/all"} <= set(found.Tags()["scalars"])
    shown = [(e.step, e.value) for e in found.Scalars("validation/all")]
    wanted = [(step, float(numbers["validation/all"])) for step, numbers in written.items()]
    assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]


def test_the_same_weights_have_the_same_loss_and_others_another(make: Make, tmp_path: Path) -> None:
    """At a rate of nothing the training loss is the draw's; this one stands still."""
    config = make("still", optimiser={"rate": 0.0}, log={"every": 2})
    loop.train(config)
    still = evaluations(tmp_path / "still")
    assert still[2] == still[4] == still[6]
    text = (tmp_path / "still" / "scalars.csv").read_text(encoding="utf-8").splitlines()
    assert len({line.split(",")[2] for line in text if ",loss/all," in line}) == 3
    assert (
        json.loads((state.checkpoint_folder(config) / "step-00000006" / state.CONFIG).read_text())[
            "validated"
        ]["best"]
        == 2
    )  # the earlier of equals
    loop.train(make("moving"))
    moving = evaluations(tmp_path / "moving")
    assert len({numbers["validation/all"] for numbers in moving.values()}) == 3


def test_averaged_weights_are_evaluated_where_there_are_any(make: Make, tmp_path: Path) -> None:
    loop.train(make("plain"))
    loop.train(make("averaged", optimiser={"ema": 0.9}))
    assert evaluations(tmp_path / "plain") != evaluations(tmp_path / "averaged")


def test_captions_of_held_out_people_are_encoded(make: Make, tmp_path: Path) -> None:
    config = make(
        run={"steps": 2},
        model={"unet": "microworld"},
        objective={"mode": "entangled"},
        data={"cache": str(tmp_path / "cache"), "crops_per_photo": 1},
    )
    assert loop.train(config).finished
    assert list(evaluations(tmp_path / "run")) == [2]


# --- the best one ----------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_the_file_is_its(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_in_turn(monkeypatch, 3.0, 1.0, 2.0, float("nan"), 1.5)
    config = make(run={"steps": 10}, checkpoints={"every": 1, "keep": 2}, optimiser={"ema": 0.5})
    loop.train(config)
    names = [path.name for path in state.checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000004", "step-00000009", "step-00000010"]
    best = read_adapter(tmp_path / "run" / "best.safetensors")
    assert best.config.training_step == 4
    averaged = read_adapter(tmp_path / "run" / "checkpoints" / names[0] / state.AVERAGE)
    wanted = averaged.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in best.state_dict().items())


def test_the_best_is_saved_between_checkpoints_too(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_in_turn(monkeypatch, 1.0, 2.0, 3.0)
    loop.train(make(checkpoints={"every": 1000, "keep": 1}))
    names = [path.name for path in state.checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000002", "step-00000006"]
    # And one can go on from it.
    best = tmp_path / "run" / "checkpoints" / names[0]
    losses_in_turn(monkeypatch, 2.0, 3.0)
    assert loop.train(make(), str(best)).step == 6


def test_standing() -> None:
    start = Standing(of="x", last=-1)
    assert start.after(2, float("nan")).best is None
    assert start.after(2, float("inf")).best is None
    two = start.after(2, 0.5)
    assert (two.best, two.loss, two.last) == (2, 0.5, 2)
    assert two.after(4, 0.5).best == 2
    assert two.after(4, 0.25).best == 4
    for standing in (start, two, two.after(4, 1.0)):
        assert standing_of(json.loads(json.dumps(standing.to_json()))) == standing
    with pytest.raises(ResumeError, match="validation is damaged"):
        standing_of({"best": 4})


# --- resuming --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(root: Path) -> Any:
    """A run that nobody broke off."""
    loop.train(resumable(root, "whole"))
    return ended(root / "whole")


def resumable(root: Path, output: str, **sections: Any) -> TrainConfig:
    return train_world.config(
        root, output,
        run={"steps": 12},
        validation={**OPTIONS, "every": 3},
        optimiser={"batch": 1, "ema": 0.5},
        checkpoints={"every": 2, "keep": 2},
        **sections,
    )  # fmt: skip


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 9, 12])
def test_asked_to_stop_anywhere_and_resumed_it_ends_alike(
    root: Path, whole: Any, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"stopped-{step}"
    update, calls = loop._Trainer._update, []

    def stop_at(self: Any, number: int) -> float:
        calls.append(number)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_update", stop_at)
        loop.train(resumable(root, output))
    assert loop.train(resumable(root, output)).finished
    assert ended(root / output) == whole


def test_killed_and_resumed_it_ends_alike(root: Path, whole: Any) -> None:
    first = train_world.Child(resumable(root, "killed"))
    first.wait_for_step(6)
    first.process.kill()
    first.wait()
    assert loop.train(resumable(root, "killed")).finished
    assert ended(root / "killed") == whole


@pytest.mark.parametrize("call", range(1, 9))
def test_lost_between_any_two_writes_it_ends_alike(
    root: Path, whole: Any, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation, its file and its checkpoint are one: none is missed, none counts twice."""
    output, calls = f"lost-{call}", []

    def lost_at(real: Any) -> Any:
        def do(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            calls.append(real)
            if len(calls) == call:
                raise KeyboardInterrupt
            return result

        return do

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_adapter", lost_at(loop.write_adapter))
        patch.setattr(state, "save", lost_at(state.save))
        patch.setattr(state, "keep_last", lost_at(state.keep_last))
        with pytest.raises(KeyboardInterrupt):
            loop.train(resumable(root, output))
    assert loop.train(resumable(root, output)).finished
    assert ended(root / output) == whole


def test_two_processes_give_what_one_gives(root: Path, tmp_path: Path) -> None:
    """Each evaluates its batches; the numbers do not depend on how many there are."""
    config = resumable(root, "one", log={"every": 3})
    still = dataclasses.replace(config, optimiser=dataclasses.replace(config.optimiser, rate=0.0))
    loop.train(still)
    run = dataclasses.replace(still.run, output=str(root / "two"))
    port = train_world.free_port()
    pair = [
        train_world.Child(dataclasses.replace(still, run=run), rank=r, world=2, port=port)
        for r in range(2)
    ]
    assert [child.wait() for child in pair] == [0, 0], pair[0].text() + pair[1].text()
    one, two = evaluations(root / "one"), evaluations(root / "two")
    assert list(one) == list(two) == [3, 6, 9, 12]
    for step, numbers in one.items():
        values = {name: float(value) for name, value in numbers.items()}
        assert {n: float(v) for n, v in two[step].items()} == pytest.approx(values, rel=1e-5)
    assert (root / "two" / "best.safetensors").is_file()


def test_a_checkpoint_from_before_validation_is_gone_on_from(make: Make, tmp_path: Path) -> None:
    off = {"every": 0}
    loop.train(make(run={"steps": 4}, validation=off))
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    record = json.loads((last / state.CONFIG).read_text(encoding="utf-8"))
    del record["config"]["validation"]
    assert "validated" not in record
    (last / state.CONFIG).write_text(json.dumps(record), encoding="utf-8")
    loop.train(make())
    assert list(evaluations(tmp_path / "run")) == [4, 6]  # at once, then as ever


def test_another_question_starts_the_best_anew(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses_in_turn(monkeypatch, 1.0, 2.0, 3.0, 4.0, 5.0)
    loop.train(make(run={"steps": 4}))
    loop.train(make(run={"steps": 6}))
    last = state.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert state.read_record(last).validated["best"] == 2
    assert "starts anew" not in caplog.text
    loop.train(make(run={"steps": 8}, validation={"seed": 3}))
    last = state.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert state.read_record(last).validated["best"] == 6  # evaluated anew before going on
    assert "starts anew" in caplog.text


def test_weights_stored_otherwise_start_the_best_anew(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses_in_turn(monkeypatch, 1.0, 2.0, 3.0, 4.0, 5.0)
    loop.train(make(run={"steps": 4}))
    monkeypatch.setattr(checks, "check_fp8", lambda _: None)
    loop.train(make(run={"steps": 6}, model={"unet_dtype": "fp8"}), changed=True)
    last = state.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert state.read_record(last).validated["best"] == 4
    assert "starts anew" in caplog.text


def test_pictures_a_second_are_the_steps_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    (tmp_path / "run").mkdir()
    kept = log.RunLog(make(log={"every": 2}), 0, main=True)
    for step in (1, 2):
        now[0] += 1.0
        kept.step(step, torch.ones(4), torch.zeros(4), 1.0, 1e-4)
        with kept.aside():
            now[0] += 100.0
    for step in (3, 4):
        now[0] += 1.0
        kept.step(step, torch.ones(4), torch.zeros(4), 1.0, 1e-4)
    kept.close()
    lines = (tmp_path / "run" / "scalars.csv").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if "images_per_second" in line]
    assert found == ["2,images_per_second,4.0", "4,images_per_second,4.0"]


# --- the file of numbers ---------------------------------------------------------------------


def test_a_resumed_file_of_numbers_goes_on_behind_its_step(tmp_path: Path) -> None:
    path = tmp_path / "scalars.csv"
    first = ScalarFile(path, 0)
    for step in (1, 2, 3):
        first.add(step, {"a": step / 3})
    with path.open("a") as file:
        file.write("4,a,0.")  # killed
    shutil.copy(path, tmp_path / "before.csv")
    ScalarFile(path, 2).add(3, {"a": 0.1})
    assert path.read_text() == f"step,name,value\n1,a,{1 / 3}\n2,a,{2 / 3}\n3,a,0.1\n"
    path.write_text("not a table\n1,2\nx,y,z\n")
    ScalarFile(path, 2)
    assert path.read_text() == "step,name,value\n"
