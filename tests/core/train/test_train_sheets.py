"""Previews of a step as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from infinite_id_core.hosts.diffusers_sample import Prompt
from infinite_id_core.scores.score import ReadFace
from trainer.config import TrainConfig
from trainer.data_index import Dataset
from trainer.prompts import PromptFile, write_prompts
from trainer.sheets import Cell, draw_sheet
from trainer.train import loop
from trainer.train.features import reference_row
from trainer.train.preview_sheet import Preview, preview_sheet
from trainer.train.previews import Previewer

from .. import train_world

SIDE = 64
STEP, LINE = SIDE + 4, 12


def middle(sheet: Image.Image, rows: int, row: int, column: int) -> Any:
    top = sheet.height - rows * (STEP + LINE)
    x, y = 4 + STEP * column + SIDE // 2, top + (STEP + LINE) * row + SIDE // 2
    return sheet.getpixel((x, y))


def label(sheet: Image.Image, rows: int, row: int, column: int) -> Image.Image:
    top = sheet.height - rows * (STEP + LINE)
    x, y = 4 + STEP * column, top + (STEP + LINE) * row + SIDE
    return sheet.crop((x, y, x + SIDE, y + LINE))


def plain(colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colour).float().div(255)[:, None, None].expand(3, 16, 16)


def blank(picture: Image.Image) -> bool:
    return ImageChops.invert(picture).getbbox() is None


def test_people_are_rows_the_reference_comes_first_and_prompts_are_columns() -> None:
    previews = [
        Preview(person="b", prompt="in the snow", picture=plain((0, 0, 90)), cosine=0.25),
        Preview(person="a", prompt="a drawing", picture=plain((0, 80, 0)), cosine=None),
        Preview(person="a", prompt="in the snow", picture=plain((0, 70, 0)), cosine=0.5),
    ]
    references = {name: Image.new("RGB", (40, 40), (200, n, 0)) for n, name in enumerate("ab")}
    prompts = ["in the snow", "a drawing"]
    sheet = preview_sheet(previews, references, prompts, SIDE)
    assert sheet.width == 4 + 3 * STEP
    assert middle(sheet, 2, 0, 0) == (200, 0, 0) and middle(sheet, 2, 1, 0) == (200, 1, 0)
    assert middle(sheet, 2, 0, 1) == (0, 70, 0) and middle(sheet, 2, 0, 2) == (0, 80, 0)
    assert middle(sheet, 2, 1, 1) == (0, 0, 90)
    assert middle(sheet, 2, 1, 2) == (225, 225, 225)  # b was not drawn
    assert not blank(label(sheet, 2, 0, 0))
    assert blank(label(sheet, 2, 0, 1))
    scored = preview_sheet(previews, references, prompts, SIDE, scored=True)
    assert not blank(label(scored, 2, 0, 1)) and not blank(label(scored, 2, 0, 2))
    assert label(scored, 2, 0, 1).tobytes() != label(scored, 2, 1, 1).tobytes()
    assert blank(label(scored, 2, 1, 2))


def test_a_column_has_its_head_and_a_picture_keeps_its_shape() -> None:
    wide = Cell(picture=Image.new("RGB", (80, 20), "black"))
    assert not blank(draw_sheet(["x"], [], SIDE))
    assert blank(draw_sheet([""], [], SIDE))
    sheet = draw_sheet(["x"], [[wide]], SIDE)
    pixels = np.asarray(sheet)[-(STEP + LINE) : -(4 + LINE), 4 : 4 + SIDE]
    assert (pixels == 0).all(axis=2).sum() == pytest.approx(SIDE * SIDE / 4, abs=SIDE)


class NoFace:
    """A recogniser that finds nobody."""

    name = "of the test"

    def read(self, picture: torch.Tensor) -> ReadFace | None:
        return None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_world.world(tmp_path_factory.mktemp("world"), held_out=2)


def with_prompts(root: Path, output: str, **sections: Any) -> TrainConfig:
    path = root / "prompts.safetensors"
    prompts = [
        Prompt(
            context=torch.full((1, 77, train_world.CONTEXT), value),
            pooled=torch.full((1, train_world.POOLED), value),
        )
        for value in (0.0, 1.0, -1.0)
    ]
    write_prompts(
        path,
        PromptFile(
            texts=("first", "second"), negative_text="", positive=tuple(prompts[:2]),
            negative=prompts[2],
        ),
    )  # fmt: skip
    previews = {"every": 2, "steps": 1, "people": 2, "sheet_side": SIDE, "prompts": str(path)}
    return train_world.config(root, output, run={"steps": 4}, previews=previews, **sections)


def test_a_run_writes_a_sheet_a_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Preview] = []
    make = Previewer.make

    def remember(self: Previewer, *args: Any) -> list[Preview]:
        made.extend(make(self, *args))
        return made[-4:]

    monkeypatch.setattr(Previewer, "make", remember)
    config = with_prompts(root, "alone")
    loop.train(config, recogniser=NoFace())
    folder = root / "alone" / "previews"
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000002.png", "step-00000004.png"]
    held_out = Dataset(config.data.folder, config.filters, "held_out")
    references = {n: held_out.photo(reference_row(held_out, n)) for n in held_out.identities}
    wanted = preview_sheet(made[4:], references, ["first", "second"], SIDE, scored=True)
    with Image.open(folder / "step-00000004.png") as sheet:
        assert sheet.tobytes() == wanted.tobytes()
        assert middle(sheet, 2, 0, 1) != middle(sheet, 2, 0, 2) != (225, 225, 225)


def test_a_sheet_has_the_pictures_of_all_processes(root: Path) -> None:
    port = train_world.free_port()
    config = with_prompts(root, "two", optimiser={"batch": 1})
    pair = [train_world.Child(config, rank=r, world=2, port=port) for r in range(2)]
    assert [child.wait() for child in pair] == [0, 0], pair[0].text() + pair[1].text()
    with Image.open(root / "two" / "previews" / "step-00000004.png") as sheet:
        places = [(row, column) for row in range(2) for column in range(3)]
        assert all(middle(sheet, 2, *place) != (225, 225, 225) for place in places)
