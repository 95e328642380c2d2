"""People, photos and a face model pack for the tests of ``prepare``.

The detector is the embedded one. The recogniser is made here, so that it never errs: it reads the
mean skin colour of the aligned face, and its cosine falls with the distance of two colours.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from microworld import files, portraits

SIZE = 256  # pixels of a photo's side
BACKGROUNDS = (0, 2, 5, 6)
SKINS = (0.0, 0.3, 0.5, 0.75, 1.0)  # of the five people, far apart for the recogniser


def make_pack(root: Path) -> Path:
    """A face model pack ``root/models/test`` of the embedded detector and the made recogniser."""
    pack = root / "models" / "test"
    pack.mkdir(parents=True)
    shutil.copy(files.DETECTOR, pack / "det.onnx")
    rng = np.random.default_rng(0)
    arrays = {
        "start": np.array([58, 44]),  # rows and columns between eyes and mouth
        "end": np.array([82, 68]),
        "axes": np.array([2, 3]),
        "weight": rng.normal(0, 11.0, (3, 512)).astype(np.float32),  # colours span [-1, 1]
        "bias": rng.uniform(0, 2 * np.pi, 512).astype(np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["input", "start", "end", "axes"], ["skin"]),
        helper.make_node("ReduceMean", ["skin"], ["colour"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["colour", "weight"], ["turned"]),
        helper.make_node("Add", ["turned", "bias"], ["angle"]),
        helper.make_node("Cos", ["angle"], ["embedding"]),  # random Fourier features
    ]
    graph = helper.make_graph(
        nodes,
        "skin colour",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 512])],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(pack / "rec.onnx"))
    return pack


def person(number: int) -> portraits.Identity:
    """One of the five people."""
    traits = np.full(12, 0.5)
    traits[0] = SKINS[number]
    traits[1] = 0.9 - 0.8 * number / 4
    return portraits.Identity.from_array(traits)


def nuisance(photo: int) -> portraits.Nuisance:
    """How photo 0..3 of anybody was taken."""
    return portraits.Nuisance(
        x=(0.0, 0.04, -0.04, 0.0)[photo], scale=(1.0, 0.95, 1.0, 1.05)[photo], scenery=photo / 4
    )


def picture(number: int, photo: int, size: int = SIZE) -> Image.Image:
    """Photo 0..3 of person 0..4."""
    attributes = portraits.Attributes(
        background=BACKGROUNDS[photo], style=0, expression=0, accessory=0
    )
    return Image.fromarray(portraits.render(person(number), attributes, nuisance(photo), size))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """A picture as a file's bytes."""
    buffer = io.BytesIO()
    options = {"quality": 92, **options} if kind == "JPEG" else options
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_people(folder: Path, people: int = 5, photos: int = 4) -> Path:
    """A folder per person: ``p0/0.jpg`` and so on."""
    for number in range(people):
        for photo in range(photos):
            path = folder / f"p{number}" / f"{photo}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(number, photo)))
    return folder
