"""Pieces of the microworld's training: their order, side by side, after a failure."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from lab import __main__
from lab.train import pieces, side_by_side


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pieces_world by a name that children can import: the host, too, has a package `tests`."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent))
    return importlib.import_module("pieces_world")


def run(names: list[str], make: side_by_side.Make, folder: Path) -> None:
    side_by_side.run(pieces.with_needs(names), pieces.NEEDS, make, folder, jobs=2, threads=6)


def made(folder: Path) -> dict[str, list[str]]:
    return {p.stem: json.loads(p.read_text())[1] for p in folder.glob("*.made")}


def test_every_piece_comes_after_what_it_needs():
    assert set(pieces.with_needs(pieces.NEEDS)) == set(pieces.NEEDS)
    for name in pieces.NEEDS:
        order = pieces.with_needs([name])
        assert order[-1] == name
        for index, piece in enumerate(order):
            assert set(pieces.NEEDS[piece]) <= set(order[:index])
    assert pieces.with_needs(["attributes"]) == ["vae", "attributes"]


def test_the_command_knows_every_piece_that_is_made():
    assert {*__main__.PIECES, "base"} == set(pieces.NEEDS)
    assert set(__main__.ALIASES.values()) <= set(pieces.NEEDS)


def test_an_unknown_piece_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"piece of the microworld \(vae, .*, got 'magic'"):
        pieces.train_piece("magic", tmp_path, 1)


def test_a_failed_piece_is_named_and_the_next_call_goes_on(world, tmp_path):
    (tmp_path / "broken").write_text("recogniser")
    with pytest.raises(
        side_by_side.PieceFailedError, match=r"recogniser ended with status 1; .*log"
    ):
        run(["scorer"], world.make, tmp_path)
    assert "no recogniser today" in (tmp_path / "logs" / "recogniser.log").read_text()
    assert "scorer" not in made(tmp_path)
    (tmp_path / "broken").unlink()
    run(["scorer"], world.make, tmp_path)
    found = made(tmp_path)
    assert set(found) == {"vae", "detector", "recogniser", "scorer"}
    for name in ("recogniser", "scorer"):
        assert set(pieces.NEEDS[name]) <= set(found[name])
    seconds = json.loads((tmp_path / side_by_side.TIMES).read_text())
    assert set(seconds) == set(found)
    assert all(value > 0.1 for value in seconds.values())
    assert json.loads((tmp_path / "vae.made").read_text())[0] == 3  # of six threads


def test_jobs_run_side_by_side(world, tmp_path):
    """Both begin before either has ended: each waits for the other's sign."""
    run(["vae", "detector"], world.meet, tmp_path)
    assert (tmp_path / "vae.here").exists() and (tmp_path / "detector.here").exists()
