"""InfiniteIDScore in ComfyUI, with the embedded models on a photograph and on portraits."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data

from nodes import NODE_CLASS_MAPPINGS

EMBEDDED = "microworld (embedded)"


def run(node: str, *args: Any, **kwargs: Any) -> Any:
    return NODE_CLASS_MAPPINGS[node].execute(*args, **kwargs)


@pytest.fixture(scope="module")
def analysis(pack) -> Any:
    return run("InfiniteIDFaceModelLoader", EMBEDDED, "CPU", 640).args[0]


@pytest.fixture(scope="module")
def clip_vision(pack) -> Any:
    return run("InfiniteIDOpenClipLoader", EMBEDDED, "none (embedded)").args[0]


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(data.astronaut()).float().unsqueeze(0) / 255


@pytest.fixture(scope="module")
def pictures(pack, photo) -> torch.Tensor:
    """Nobody, a portrait of somebody else, and the person of the photo."""
    from PIL import Image

    portraits = importlib.import_module(f"{pack.__name__}.microworld.portraits")
    other = portraits.render(portraits.Identity.from_seed(3), portraits.Attributes(
        background=0, style=0, expression=0, accessory=0))  # fmt: skip
    large = np.asarray(Image.fromarray(other).resize((512, 512)), dtype=np.float32) / 255
    return torch.cat([torch.zeros_like(photo), torch.from_numpy(large)[None], photo])


def test_best_and_ranked_with_a_reference(analysis, photo, pictures):
    output = run("InfiniteIDScore", pictures, analysis, reference=photo)
    table, best, ranked, likeness = output.args
    assert torch.equal(best, photo) and torch.equal(ranked, pictures[[2, 1, 0]])
    assert likeness == pytest.approx(1.0)
    assert [line.split()[1] for line in table.splitlines()[1:4]] == ["2", "1", "0"]
    assert output.ui.as_dict()["text"] == (table,)


def test_an_identity_gives_the_same_likeness_as_its_photo(analysis, clip_vision, photo, pictures):
    align = {"choose": "largest", "index": 0, "order": "left to right", "padding": 0.25,
             "if_no_face": "error"}  # fmt: skip
    faces = run("InfiniteIDAlignFace", analysis, photo, **align).args[0]
    identity = run("InfiniteIDEncode", faces, clip_vision, "stack").args[0]
    by_identity = run("InfiniteIDScore", pictures[1:2], analysis, identity=identity).args
    by_photo = run("InfiniteIDScore", pictures[1:2], analysis, reference=photo).args
    assert by_identity[3] == pytest.approx(by_photo[3], abs=1e-5)


def test_clip_scores_with_the_embedded_open_clip(analysis, clip_vision, photo, pictures):
    output = run(
        "InfiniteIDScore", pictures, analysis, reference=photo, clip_vision=clip_vision,
        prompt="a photo of a person",
    )  # fmt: skip
    cells = [line.split() for line in output.args[0].splitlines()[1:4]]
    assert cells[0][2] == cells[0][3] == "1.000" and abs(float(cells[0][4])) < 1
    assert cells[2][2:5] == ["no", "face", "-"] and abs(float(cells[2][5])) < 1


def test_named_errors(pack, analysis, photo, pictures):
    errors = pack.infinite_id_core.errors
    with pytest.raises(errors.OptionError, match="identity, or a reference"):
        run("InfiniteIDScore", pictures, analysis)
    with pytest.raises(errors.NoFaceError, match="reference"):
        run("InfiniteIDScore", pictures, analysis, reference=torch.zeros_like(photo))
    with pytest.raises(errors.OptionError, match="connect clip_vision"):
        run("InfiniteIDScore", pictures, analysis, reference=photo, prompt="a person")
    with pytest.raises(errors.FaceModelError):
        run("InfiniteIDScore", pictures, object(), reference=photo)


def test_nobody_found_keeps_the_order(analysis, photo):
    nobody = torch.stack([torch.full((64, 64, 3), value) for value in (0.0, 0.5)])
    _, best, ranked, likeness = run("InfiniteIDScore", nobody, analysis, reference=photo).args
    assert torch.equal(best, nobody[:1]) and torch.equal(ranked, nobody) and likeness == 0.0
