"""Pieces of the microworld's training: their order, side by side, after a failure."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from microworld import __main__
from microworld.train import pieces


def make(name: str, folder: Path) -> None:
    """A piece that says what was there when it began; `folder/broken` names one that fails."""
    broken = folder / "broken"
    if broken.exists() and broken.read_text() == name:
        raise RuntimeError(f"no {name} today")
    print("making", name)
    there = sorted(path.stem for path in folder.glob("*.made"))
    time.sleep(0.3)
    (folder / f"{name}.made").write_text(json.dumps([time.time(), there]))


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
        pieces.train_piece("magic", tmp_path)


def test_a_failed_piece_is_named_and_the_next_call_goes_on(tmp_path):
    (tmp_path / "broken").write_text("recogniser")
    with pytest.raises(pieces.PieceFailedError, match=r"recogniser ended with status 1; .*log"):
        pieces.train_all(["scorer"], tmp_path, jobs=2, make=make)
    assert "no recogniser today" in (tmp_path / "logs" / "recogniser.log").read_text()
    assert "scorer" not in made(tmp_path)
    (tmp_path / "broken").unlink()
    pieces.train_all(["scorer"], tmp_path, jobs=2, make=make)
    found = made(tmp_path)
    assert set(found) == {"vae", "detector", "recogniser", "scorer"}
    for name in ("recogniser", "scorer"):
        assert set(pieces.NEEDS[name]) <= set(found[name])
    seconds = json.loads((tmp_path / pieces.TIMES).read_text())
    assert set(seconds) == set(found)
    assert all(value > 0.3 for value in seconds.values())


def test_jobs_run_side_by_side(tmp_path):
    """Both begin before either has ended: each waits for the other's sign."""
    pieces.train_all(["vae", "detector"], tmp_path, jobs=2, make=meet)
    assert (tmp_path / "vae.here").exists() and (tmp_path / "detector.here").exists()


def meet(name: str, folder: Path) -> None:
    """Waits for the other piece; fails if it never comes."""
    (folder / f"{name}.here").touch()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.here"))) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError(name)
        time.sleep(0.05)
