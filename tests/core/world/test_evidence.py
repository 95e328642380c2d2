"""The ablations' plan, and what is made of their scores."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from lab import ablations, evidence
from microworld.portraits import STYLES, TRAIN_SEEDS, Attributes


def test_rows_have_names_of_their_own_and_enough_pictures():
    rows = (*ablations.CORE, *ablations.OPEN, *ablations.SWEEPS)
    assert len({ablations.piece_path(ablations.Path("x"), r, 0) for r in rows}) == len(rows)
    for row in (*ablations.CORE, *ablations.OPEN):
        assert row.people * ablations.PROMPTS >= 200


@pytest.mark.parametrize("person", [0, 7])
def test_people_and_prompts_are_held_out(person):
    asked = ablations.prompts_of(person)
    assert all(a.is_held_out for a in asked) and len(set(asked)) == ablations.PROMPTS
    assert [sum(a.style == s for a in asked) for s in range(len(STYLES))] == [2] * len(STYLES)
    assert ablations._FIRST + person not in TRAIN_SEEDS


def test_a_small_photo_has_less_detail_and_is_otherwise_the_same():
    whole, small = ablations.photos_of(3, 1)[0], ablations.photos_of(3, 1, side=24)[0]
    assert whole.shape == small.shape
    detail = [np.abs(np.diff(p.astype(int), n=2, axis=0)).mean() for p in (whole, small)]
    assert detail[1] < 0.7 * detail[0]
    assert abs(float(whole.mean()) - float(small.mean())) < 3


def line(row: str, person: int, likeness: str, right: str = "1111", **more: str) -> dict[str, str]:
    names = ("background_right", "style_right", "expression_right", "accessory_right")
    values = dict(zip(names, right, strict=True))
    whole = {**dict.fromkeys(ablations.COLUMNS, "0"), "style": "sketch", **values, **more}
    return {**whole, "row": row, "person": str(person), "likeness": likeness}


def test_a_picture_without_a_face_is_nobody():
    lines = [line("full method", 0, "0.8"), line("full method", 1, "")]
    assert evidence.mean(lines, "likeness").mean == pytest.approx(0.4)
    assert evidence.mean(lines, "likeness").units == 2


def test_the_prompt_counts_by_attributes():
    lines = [line("x", 0, "0", "1100"), line("x", 1, "0", "1111")]
    assert evidence.mean(lines, "prompt").mean == pytest.approx(0.75)


def test_the_table_counts_styles_on_style_prompts_only():
    lines = [line("x", 0, "0", "1011"), line("x", 1, "0", "1111", style="photo")]
    cells = evidence.table({"x": lines}).splitlines()[2].split("|")
    assert cells[6].split()[0] == "0.000" and cells[2].strip() == "2"


def test_what_is_written_beside_the_scores(tmp_path):
    rng = np.random.default_rng(0)
    names = ["full method", "plain base", "strength 0.5", "mixed 0.5 with another"]
    rows = [ablations.ROWS[name] for name in names]
    for row in rows:
        for _, first in ablations.pieces([row]):
            path = ablations.piece_path(tmp_path, row, first)
            made = rng.integers(0, 256, (5, ablations.PROMPTS, 128, 128, 3), dtype=np.uint8)
            np.savez(path, pictures=made)
    scores = tmp_path / "all.csv"
    with scores.open("w", newline="") as file:
        writer = csv.DictWriter(file, ablations.COLUMNS)
        writer.writeheader()
        for name in names:
            writer.writerows(line(name, person, "0.5") for person in range(3))
    evidence.write(tmp_path, scores)
    assert len((tmp_path / "all.md").read_text().splitlines()) == 2 + len(names)
    assert Image.open(tmp_path / "all_curves.png").width > 400
    with Image.open(tmp_path / "all_comparison.png") as picture:
        assert picture.height == 2 * 128  # rows that are no point of a curve
    with Image.open(tmp_path / "people_and_prompts.png") as picture:
        page = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(page[:128, :128] - ablations.photos_of(0, 1)[0]).mean() < 25  # of 256 colours
    assert np.abs(page[:128, :128] - ablations.photos_of(1, 1)[0]).mean() > 25
    assert isinstance(ablations.prompts_of(0)[0], Attributes)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_all_pieces_once_and_of_one_size(count):
    rows = (*ablations.OPEN, *ablations.SWEEPS)
    parts = [ablations.share(rows, number, count) for number in range(count)]
    dealt = [(row.name, first) for part in parts for row, first in part]
    assert sorted(dealt) == sorted((row.name, first) for row, first in ablations.pieces(rows))
    people = [sum(min(ablations.PIECE, r.people - first) for r, first in part) for part in parts]
    assert max(people) - min(people) <= ablations.PIECE
