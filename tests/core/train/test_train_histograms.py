"""What a run would learn from, in bars: in its dry run and its report."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from trainer.histograms import bars, binned, doubling
from trainer.train import loop
from trainer.train.estimate import dry_run

from .. import train_world


def counts(text: str, title: str) -> dict[str, int]:
    """The lines below a title, by their names; every bar is as long as its number says."""
    block = next(part for part in text.split("\n\n") if part.startswith(title))
    found, lengths = {}, {}
    for line in block.strip().splitlines()[1:]:
        name, count, bar = re.fullmatch(r"  +(.+?)  +([\d,]+)(?:  (#+))?", line).groups()
        found[name] = int(count.replace(",", ""))
        lengths[name] = len(bar or "")
    most = max(found.values())
    for name, count in found.items():
        assert lengths[name] == (count and max(1, round(40 * count / most)))
    return found


def test_bars() -> None:
    text = bars("things", {"a": 1000, "bb": 500, "c": 1, "d": 0})
    assert counts(text, "things") == {"a": 1000, "bb": 500, "c": 1, "d": 0}
    assert bars("nothing", {}) == "nothing"


def test_every_value_is_in_one_bin() -> None:
    assert binned(np.array([3, 3, 4, 7])) == {"3": 2, "4": 1, "5": 0, "6": 0, "7": 1}
    assert binned(np.array([10.5, 29.9]), bins=2) == {"10-19": 1, "20-29": 1}
    assert binned(np.array([5.0])) == {"5": 1}
    assert binned(np.array([])) == {}
    rng = np.random.default_rng(0)
    for size in (1, 7, 1000):
        found = binned(rng.uniform(0, 3000, size))
        assert len(found) <= 10 and sum(found.values()) == size


def test_counts_are_binned_by_doubling() -> None:
    assert doubling(np.array([2, 3, 3, 4, 9])) == {"2-3": 3, "4-7": 1, "8-15": 1}
    assert doubling(np.array([1, 1])) == {"1": 2}
    assert doubling(np.array([5])) == {"4-7": 1}
    assert doubling(np.array([], dtype=np.int64)) == {}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_world.world(tmp_path_factory.mktemp("world"), people=7, photos=4, held_out=2)


def test_the_dry_run_and_the_report_show_what_is_learned_from(root: Path) -> None:
    config = train_world.config(root, run={"steps": 1})
    shown = dry_run(config)
    assert counts(shown, "people\n") == {"train": 5, "held out": 2}
    assert counts(shown, "people by their photos") == {"4-7": 5}
    assert counts(shown, "photos by the short side of the face") == {"32": 20}
    sizes = counts(shown, "photos by bucket")
    assert sum(sizes.values()) == 20 and len(sizes) == 3  # three aspects
    assert "each gives 2 crops" in shown
    loop.train(config)
    report = (root / "run" / "report.txt").read_text(encoding="utf-8")
    assert report.partition("\n\n")[2].strip() in shown
    assert counts(report, "people\n") == {"train": 5, "held out": 2}


def test_bars_are_of_the_runs_own_filters_and_sizes(root: Path) -> None:
    config = train_world.config(
        root,
        "other",
        filters={"min_short_side": 80, "min_face_size": 0, "min_photos": 1},
        data={"max_aspect": 1.0, "crops_per_photo": 3},
    )
    shown = dry_run(config)
    sizes = counts(shown, "photos by bucket")
    assert list(sizes) == ["64 x 64"] and 0 < sizes["64 x 64"] < 20
    assert "each gives 3 crops" in shown
    assert counts(shown, "people by their photos") != {"4-7": 5}
