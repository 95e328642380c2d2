"""``python -m trainer generate`` as a user types it, on the embedded models."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer.__main__ import main

ASKED = ["generate", "--prompt", "a photo of a woman", "--steps", "2", "--device", "cpu"]


def test_the_embedded_models_paint_at_their_own_size(tmp_path: Path) -> None:
    assert main([*ASKED, "--output", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").size == (128, 128)


def test_a_picture_that_is_there_is_not_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_1.png").write_bytes(b"mine")
    two = [*ASKED, "--prompt", "a man", "--output", str(tmp_path / "a.png")]
    assert main(two) == 1
    assert "a_1.png is there already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a_1.png"]
    assert (tmp_path / "a_1.png").read_bytes() == b"mine"
    assert main([*two, "--overwrite"]) == 0
    assert Image.open(tmp_path / "a_1.png").size == (128, 128)


@pytest.mark.parametrize("name", ["", "a.jpg"])
def test_output_is_a_png(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--output", str(tmp_path / name)]) == 1
    assert "ends in .png" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_option_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    told = capsys.readouterr().out
    for default in ("1024", "128 for the embedded", "default: 30", "default: 5", "picture.png"):
        assert default in told
