"""Rate of ``prepare`` against its detector and recogniser run bare on the same photos.

    python benchmarks/prepare.py [--photos 400] [--cost real|embedded] [--workers 2] [--rounds 3]

Bare is the least anybody could do: in as many processes, for each file ``cv2.imread`` and
insightface's ``FaceAnalysis.get``, nothing written. Both sides are timed whole, from starting
their processes to the last photo, in turns; ``prepare`` also decodes safely, hashes, scores,
groups, writes shards, index and report. Target: at least 0.9 of the bare rate.

``--cost real`` gives the embedded models ballast, so that a picture costs as much arithmetic as
with buffalo_l (SCRFD-10G at 640 px: 10 GFLOP a picture; ResNet-50: 6 GFLOP a face); ``embedded``
runs them as they are, where file handling weighs far more than it ever does in practice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))

from microworld import files, portraits
from trainer.prepare.options import Places, PrepareOptions, RunOptions
from trainer.prepare.run import prepare

DETECTOR_GFLOP, RECOGNISER_GFLOP = 10.0, 6.3
PHOTO_SIDE, EACH = 768, 8  # pixels; photos of one person


def main() -> None:
    """Time both sides in turns and print the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--cost", choices=("real", "embedded"), default="real")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    values = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photos = make_photos(root / "photos", values.photos)
        pack = files.FACE_MODELS if values.cost == "embedded" else ballasted(root)
        times: dict[str, list[float]] = {"bare": [], "prepare": []}
        for number in range(values.rounds):
            times["bare"].append(time_bare(photos, pack, values.workers))
            output = root / f"out{number}"
            times["prepare"].append(time_prepare(root / "photos", output, pack, values.workers))
            print(f"round {number + 1}: " + ", ".join(
                f"{name} {len(photos) / t[-1]:.2f} photos/s" for name, t in times.items()
            ))  # fmt: skip
    bare, ours = (statistics.median(times[name]) for name in ("bare", "prepare"))
    print(f"prepare / bare = {bare / ours:.3f} ({values.cost} cost, {values.workers} workers)")


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


def time_bare(photos: list[Path], pack: Path, workers: int) -> float:
    """Seconds for detector and recogniser alone, in ``workers`` processes."""
    context = multiprocessing.get_context("spawn")
    started = time.monotonic()
    threads = RunOptions(workers=workers).thread_count
    with ProcessPoolExecutor(workers, context) as pool:
        pieces = [photos[i::workers] for i in range(workers)]
        found = list(pool.map(run_bare, pieces, [pack] * workers, [threads] * workers))
    assert sum(found) > 0.9 * len(photos), f"bare found {sum(found)} faces in {len(photos)} photos"
    return time.monotonic() - started


def run_bare(photos: list[Path], pack: Path, threads: int) -> int:
    """One process: faces found."""
    import cv2

    from infinite_id_core.face import load_face_models

    app = load_face_models(pack.name, [pack.parent.parent], "CPU", 640, threads=threads)
    return sum(len(app.get(cv2.imread(str(path)))) for path in photos)


def time_prepare(source: Path, output: Path, pack: Path, workers: int) -> float:
    """Seconds for all of ``prepare``, report included."""
    places = Places(source=source, output=output, face_models=pack)
    run = RunOptions(workers=workers, provider="cpu", progress=False)
    started = time.monotonic()
    prepare(places, PrepareOptions(), run)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
