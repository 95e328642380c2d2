"""Rate of ``prepare`` against its detector and recogniser run bare on the same photos.

    python benchmarks/prepare.py [--photos 400] [--cost real|embedded] [--workers 2] [--rounds 3]

Bare is the least anybody could do: as many processes with as many threads; for each file
``cv2.imread``, the detector, one ``warpAffine``, and the recogniser in batches; nothing checked,
nothing written. Both sides are timed whole, from starting their processes to the last photo, in
turns; ``prepare`` also decodes safely, hashes, scores,
groups, writes shards, index and report. Target: at least 0.9 of the bare rate.

``--cost real`` gives the embedded models ballast, so that a picture costs as much arithmetic as
with buffalo_l (SCRFD-10G at 640 px: 10 GFLOP a picture; ResNet-50: 6 GFLOP a face); ``embedded``
runs them as they are, where file handling weighs far more than it ever does in practice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# In place of this folder, where trainer.py hides the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from infinite_id_core.faces.align import crop_matrix  # noqa: E402
from infinite_id_core.faces.pack import load_face_models  # noqa: E402
from microworld import files, portraits  # noqa: E402
from trainer.prepare.options import Places, PrepareOptions, RunOptions  # noqa: E402
from trainer.prepare.run import prepare  # noqa: E402

DETECTOR_GFLOP, RECOGNISER_GFLOP = 10.0, 6.3
PHOTO_SIDE, EACH = 768, 8  # pixels; photos of one person
PIECE = 16  # photos a process takes at a time


def main() -> None:
    """Time both sides in turns and print the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--cost", choices=("real", "embedded"), default="real")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process's models")
    parser.add_argument("--rounds", type=int, default=3)
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photos = make_photos(root / "photos", values.photos)
        pack = files.FACE_MODELS if values.cost == "embedded" else ballasted(root)
        times: dict[str, list[float]] = {"bare": [], "prepare": []}
        work: dict[str, list[float]] = {"bare": [], "prepare": []}
        for number in range(values.rounds):
            how = (pack, values.workers, values.threads)
            sides: dict[str, Callable[[], float]] = {
                "bare": partial(time_bare, photos, *how),
                "prepare": partial(time_prepare, root / "photos", root / f"out{number}", *how),
            }
            for name, side in sides.items():
                before = cpu_seconds()
                times[name].append(side())
                work[name].append(cpu_seconds() - before)
            print(f"round {number + 1}: " + ", ".join(
                f"{name} {len(photos) / t[-1]:.2f} photos/s" for name, t in times.items()
            ))  # fmt: skip
    bare, ours = (statistics.median(times[name]) for name in ("bare", "prepare"))
    print(f"prepare / bare = {bare / ours:.3f} ({values.cost} cost, {values.workers} workers)")
    bare, ours = (statistics.median(work[name]) for name in ("bare", "prepare"))
    print(f"by CPU time, which other programs disturb less: {bare / ours:.3f}")


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    return sum(os.times()[:4])


def make_photos(folder: Path, count: int) -> list[Path]:
    """Portraits of many people as JPEG files, a folder per person."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        person = portraits.Identity.from_seed(number // EACH)
        attributes = portraits.Attributes.sample(rng)
        picture = portraits.render(person, attributes, portraits.Nuisance.sample(rng), PHOTO_SIDE)
        path = folder / f"p{number // EACH:04d}" / f"{number % EACH}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=92)
        paths.append(path)
    return paths


def ballasted(root: Path) -> Path:
    """The embedded pack with arithmetic added up to buffalo_l's; its results do not change."""
    pack = root / "models" / "ballast"
    pack.mkdir(parents=True)
    add_ballast(files.DETECTOR, pack / "det.onnx", DETECTOR_GFLOP, side=640)
    add_ballast(files.RECOGNISER, pack / "rec.onnx", RECOGNISER_GFLOP, side=112)
    return pack


def add_ballast(source: Path, target: Path, gflop: float, side: int) -> None:
    """Append 3x3 convolutions of 64 channels, whose result times zero joins the first output."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(source))
    graph = model.graph
    rng = np.random.default_rng(0)
    stride = 8 if side > 200 else 2
    pixels = (side // stride) ** 2
    layers = max(1, round(gflop * 1e9 / (2 * 9 * 64 * 64 * pixels)))
    name, width = graph.input[0].name, 3
    for layer in range(layers + 1):
        first = layer == 0
        weight = rng.normal(0, 1 / np.sqrt(9 * width), (64, width, 3, 3)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(weight, f"ballast_w{layer}"))
        graph.node.append(
            helper.make_node(
                "Conv", [name, f"ballast_w{layer}"], [f"ballast_{layer}"],
                kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[stride if first else 1] * 2,
            )
        )  # fmt: skip
        graph.node.append(helper.make_node("Relu", [f"ballast_{layer}"], [f"ballast_r{layer}"]))
        name, width = f"ballast_r{layer}", 64
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = [f"{output}_own" if o == output else o for o in node.output]
        node.input[:] = [f"{output}_own" if i == output else i for i in node.input]
    # A sum over everything, times zero: one number that changes nothing.
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "ballast_zero"))
    graph.node.extend(
        [
            helper.make_node("ReduceMean", [name], ["ballast_mean"], keepdims=0),
            helper.make_node("Mul", ["ballast_mean", "ballast_zero"], ["ballast_nothing"]),
            helper.make_node("Add", [f"{output}_own", "ballast_nothing"], [output]),
        ]
    )
    onnx.save(model, str(target))


def time_bare(photos: list[Path], pack: Path, workers: int, threads: int) -> float:
    """Seconds for detector and recogniser alone, in ``workers`` processes."""
    context = multiprocessing.get_context("spawn")
    started = time.monotonic()
    with ProcessPoolExecutor(workers, context) as pool:
        pieces = [photos[i : i + PIECE] for i in range(0, len(photos), PIECE)]
        found = sum(pool.map(run_bare, pieces, [pack] * len(pieces), [threads] * len(pieces)))
    if found < 0.9 * len(photos):
        raise SystemExit(f"bare found {found} faces in {len(photos)} photos; nothing to compare")
    return time.monotonic() - started


def run_bare(photos: list[Path], pack: Path, threads: int) -> int:
    """Detector and recogniser on all faces of a few photos: how many."""
    import cv2

    app = load(pack, threads)
    crops = []
    for path in photos:
        picture = cv2.imread(str(path))
        _, landmarks = app.det_model.detect(picture)
        for points in landmarks:
            matrix = crop_matrix(points.astype(float), 112, 0.0)
            crops.append(cv2.warpAffine(picture, matrix, (112, 112)))
    return len(app.models["recognition"].get_feat(crops)) if crops else 0


@lru_cache(maxsize=1)
def load(pack: Path, threads: int) -> Any:
    """The models, once per process."""
    return load_face_models(pack.name, [pack.parent.parent], "CPU", 640, threads=threads)


def time_prepare(source: Path, output: Path, pack: Path, workers: int, threads: int) -> float:
    """Seconds for all of ``prepare``, report included."""
    places = Places(source=source, output=output, face_models=pack)
    run = RunOptions(workers=workers, threads=threads, provider="cpu", progress=False)
    started = time.monotonic()
    prepare(places, PrepareOptions(), run)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
