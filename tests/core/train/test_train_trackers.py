"""TensorBoard and wandb get the same numbers and pictures, and a resumed run stays one run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infinite_id_core.errors import MissingPackageError
from trainer.config import TrainConfig
from trainer.errors import TrackerError
from trainer.train import loop
from trainer.train.estimate import dry_run
from trainer.train.trackers import RUN_ID, Trackers, run_id, settings

from .. import train_world

Make = Callable[..., TrainConfig]
BOTH = {"trackers": ["wandb", "tensorboard"], "every": 1}


@pytest.fixture(scope="module")
def root() -> Path:
    return train_world.shared()


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Make:
    def settings(name: str = "run", **sections: Any) -> TrainConfig:
        run = {"output": str(tmp_path / name), **sections.pop("run", {})}
        return train_world.config(root, run=run, **sections)

    return settings


class FakeWandb(SimpleNamespace):
    """What accelerate's tracker calls of wandb, written down."""

    class Error(Exception):
        """wandb's own base class."""

    def __init__(self) -> None:
        super().__init__(inits=[], logs=[], told=[], finished=0, logins=0)
        self.config = SimpleNamespace(update=lambda values, **_: self.told.append(values))

    def login(self) -> bool:
        self.logins += 1
        return True

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, values: dict[str, Any], step: int) -> None:
        self.logs.append((step, values))

    def _finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Image(image: Any) -> Any:
        return image


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's numbers by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {
        name: {entry.step: entry.value for entry in found.Scalars(name)}
        for name in found.Tags()["scalars"]
    }


def test_both_trackers_get_the_same_numbers_and_a_resumed_run_is_one_run(
    make: Make, wandb: FakeWandb, tmp_path: Path
) -> None:
    for steps in (2, 4):
        assert loop.train(make(run={"steps": steps}, log=BOTH)).finished
    first, second = wandb.inits
    assert first["project"] == "infinite-id"
    assert first == second
    assert first["resume"] == "allow"
    assert first["id"] == (tmp_path / "run" / RUN_ID).read_text(encoding="utf-8")
    assert (first["name"], first["dir"]) == ("run", str(tmp_path / "run"))
    assert wandb.finished == 2
    assert [told["run"]["steps"] for told in wandb.told] == [2, 4]
    sent: dict[str, dict[int, float]] = {}
    for step, values in wandb.logs:
        for name, value in values.items():
            sent.setdefault(name, {})[step] = pytest.approx(value, rel=1e-6)
    assert sorted(sent["loss/all"]) == [1, 2, 3, 4]
    assert scalars(tmp_path / "run" / "logs") == sent


def test_pictures_are_tensorboards_as_ever_and_wandbs_the_same(
    make: Make, wandb: FakeWandb, tmp_path: Path
) -> None:
    from accelerate import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    PartialState(cpu=True)
    picture = torch.rand(3, 6, 10, generator=torch.Generator().manual_seed(0))
    trackers = Trackers(make(log=BOTH), 0)
    name = f"preview/a\\b..:person/{'long prompt? ' * 30}"
    trackers.pictures(7, {name: picture})
    trackers.close()
    with SummaryWriter(str(tmp_path / "plain")) as writer:
        writer.add_image(name, picture, 7)
    found = []
    for folder in ("run/logs", "plain"):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        assert events.Tags()["images"] == [name]
        found += [(e.step, e.encoded_image_string) for e in events.Images(name)]
    assert found[0] == found[1]
    ((step, values),) = wandb.logs
    ((key, (sent,)),) = values.items()
    assert step == 7
    assert re.fullmatch(r"preview/a_b___person/[\w ]{1,80}", key)
    assert np.abs(sent / 255.0 - picture.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_paths_and_notes_are_not_told(make: Make) -> None:
    told = settings(make(log={"trackers": ["wandb"]}))
    assert told["optimiser"]["rate"] == 1e-3
    assert told["objective"]["mode"] == "identity"
    texts = [v for entries in told.values() for v in entries.values() if isinstance(v, str)]
    assert not any(os.sep in text for text in texts)
    assert "output" not in told["run"]
    assert "unet" not in told["model"]


def test_a_missing_package_is_named_by_the_dry_run_too(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    for start in (dry_run, loop.train):
        with pytest.raises(MissingPackageError, match=r"'wandb'.*leave 'wandb' out of log\.track"):
            start(make(log={"trackers": ["wandb"]}))


def test_nobody_logged_in_is_named_before_anything_starts(
    make: Make, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> bool:
        raise FakeWandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "login", refuse)
    for start in (dry_run, loop.train):
        with pytest.raises(TrackerError, match=r"No API key.*wandb login.*WANDB_MODE=offline"):
            start(make(log={"trackers": ["wandb"]}))
    assert wandb.inits == []


def test_one_id_for_one_folder(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path / "other") != first
    (tmp_path / RUN_ID).write_text("mine_2\n", encoding="utf-8")
    assert run_id(tmp_path) == "mine_2"
    (tmp_path / RUN_ID).write_text("../x", encoding="utf-8")
    with pytest.raises(TrackerError, match="wandb-run-id: expected the id.*'../x'"):
        run_id(tmp_path)


def test_wandb_is_imported_only_where_it_is_chosen(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it is an error
    config = make(run={"steps": 1}, log={"trackers": ["tensorboard"]})
    assert dry_run(config)
    assert loop.train(config).finished


def test_wandb_itself_offline(make: Make, tmp_path: Path) -> None:
    """The real package: a run and its continuation have one id, and the pictures are there."""
    pytest.importorskip("wandb")
    for steps in (1, 2):
        config = make(
            run={"steps": steps},
            log={"trackers": ["wandb"], "every": 1},
            previews={"every": 1, "steps": 1, "people": 1},
        )
        child = train_world.Child(config, WANDB_MODE="offline")
        assert child.wait() == 0, child.text()
    found = [p.name for p in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(found) == 2
    assert all(name.endswith(f"-{run_id(tmp_path / 'run')}") for name in found)
    media = "offline-run-*/files/media/images/**/*.png"
    pictures = list((tmp_path / "run" / "wandb").glob(media))
    sheets = [path for path in pictures if path.name.startswith("sheet")]
    assert len(sheets) == 2 and len(pictures) == 4  # of each step the sheet and a picture
    assert all(Image.open(path).size == (64, 64) for path in set(pictures) - set(sheets))
