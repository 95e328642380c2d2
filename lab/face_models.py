"""The embedded detector and recogniser as ONNX files that insightface's own loader takes.

    python -m lab.face_models --out DIR

trains both on pictures drawn here (a few minutes on two threads) and writes DIR/det.onnx and
DIR/rec.onnx. The detector has SCRFD's nine outputs (score, box, landmarks at strides 8, 16, 32, two
anchors) and input of any multiple of 32; the recogniser has ArcFace's input and output.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from insightface.utils import face_align
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from microworld import files, portraits
from microworld.config import RECOGNISER_SIZE

from .face_export import export_detector, export_recogniser
from .face_networks import ANCHORS, STRIDE, Detector, Recogniser
from .face_scenes import (
    ASTRONAUT_LANDMARKS,
    Scene,
    SceneMaker,
    astronaut_sources,
    background_pictures,
    portrait_sources,
)

# --- training the detector -------------------------------------------------------------------


def train_detector(
    *,
    seed: int = 0,
    scenes: int = 4000,
    rounds: tuple[int, ...] = (1500, 700, 700),
    batch: int = 32,
) -> Detector:
    """Train on freshly drawn scenes, one round of so many steps after another.

    After each round a third of the scenes makes way for empty ones in which it still sees faces.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    maker = SceneMaker(astronaut_sources(), portrait_sources(300, rng), background_pictures())
    drawn = [maker.make(rng) for _ in range(scenes)]
    model = Detector().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=sum(rounds))
    for number, steps in enumerate(rounds):
        if number:
            drawn[: scenes // 3] = _mistaken(model, maker, scenes // 3, rng)
        pictures = _stacked([scene.picture for scene in drawn])
        targets = [torch.stack(p) for p in zip(*(_targets(s) for s in drawn), strict=True)]
        model.train()
        for step, rows in enumerate(_batches(scenes, batch, steps, rng)):
            images = _photometric(pictures[rows].float() / 127.5 - 1, rng)
            loss = _detector_loss(model(images), *(part[rows] for part in targets))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            if step % 100 == 0:
                print(f"detector {number}: {step}/{steps} loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def _mistaken(
    model: Detector, maker: SceneMaker, count: int, rng: np.random.Generator
) -> list[Scene]:
    """Of four times as many empty scenes, those with the highest scores."""
    model.eval()
    found: list[tuple[float, Scene]] = []
    for _ in range(4 * count // 50):
        scenes = [maker.empty(rng) for _ in range(50)]
        scores = model(_stacked([s.picture for s in scenes]).float() / 127.5 - 1)[0].amax((1, 2))
        found += zip(scores.tolist(), scenes, strict=True)
    found.sort(key=lambda pair: -pair[0])
    print(f"detector sees faces in {sum(s > 0 for s, _ in found)} of {len(found)} empty scenes")
    return [scene for _, scene in found[:count]]


def _stacked(pictures: list[NDArray[np.uint8]]) -> torch.Tensor:
    # BHWC -> BCHW
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _batches(
    count: int, batch: int, steps: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Every row once before any row twice."""
    order = np.concatenate([rng.permutation(count) for _ in range(steps * batch // count + 1)])
    for step in range(steps):
        yield order[step * batch : (step + 1) * batch]


def _photometric(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Light, colour and noise differ at every showing. [b, 3, h, w] in -1..1, roughly kept."""
    count = images.shape[0]
    gain = torch.from_numpy(rng.uniform(0.7, 1.25, (count, 1, 1, 1)).astype(np.float32))
    tint = torch.from_numpy(rng.uniform(-0.15, 0.15, (count, 3, 1, 1)).astype(np.float32))
    grey = torch.from_numpy((rng.random((count, 1, 1, 1)) < 0.12).astype(np.float32))
    noise = torch.from_numpy(rng.uniform(0, 0.06, (count, 1, 1, 1)).astype(np.float32))
    images = images * (1 - grey) + images.mean(1, keepdim=True) * grey
    return (images * gain + tint + noise * torch.randn_like(images)).clamp(-1, 1)


def _targets(scene: Scene) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each cell and anchor should say.

    Returns label [n, 2] (1 face, 0 none, -1 either), boxes [n, 2, 4], landmarks [n, 2, 10].
    """
    cells = scene.picture.shape[0] // STRIDE
    ys, xs = np.divmod(np.arange(cells * cells), cells)
    centres = np.stack([xs, ys], axis=1) * float(STRIDE)
    label = np.zeros((len(centres), 2), dtype=np.float32)
    boxes = np.zeros((len(centres), 2, 4), dtype=np.float32)
    landmarks = np.zeros((len(centres), 2, 10), dtype=np.float32)
    for box, points in zip(scene.boxes, scene.landmarks, strict=True):
        size = math.sqrt(float(np.prod(box[2:] - box[:2])))
        middle = (box[:2] + box[2:]) / 2
        distance = np.abs(centres - middle).max(axis=1)
        # At least the nearest cell, whatever the size.
        core = distance <= max(0.18 * size, STRIDE / 2)
        around = distance <= max(0.45 * size, STRIDE)
        for index, anchor in enumerate(ANCHORS):
            if not anchor["may"][0] <= size <= anchor["may"][1]:
                continue
            label[around & (label[:, index] == 0), index] = -1
            sure = anchor["find"][0] <= size <= anchor["find"][1]
            if sure and _visible(box, scene.picture.shape[0]) > 0.75:
                label[core, index] = 1
                unit = anchor["unit"]
                boxes[core, index, :2] = (centres[core] - box[:2]) / unit
                boxes[core, index, 2:] = (box[2:] - centres[core]) / unit
                offsets = points[None] - centres[core][:, None]
                landmarks[core, index] = offsets.reshape(-1, 10) / unit
    return torch.from_numpy(label), torch.from_numpy(boxes), torch.from_numpy(landmarks)


def _visible(box: NDArray[np.float64], canvas: int) -> float:
    inside = np.clip(box, 0, canvas)
    return float(np.prod(inside[2:] - inside[:2]) / np.prod(box[2:] - box[:2]))


def _detector_loss(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    label: torch.Tensor, boxes: torch.Tensor, landmarks: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Cross-entropy on the scores, smooth L1 on boxes and landmarks of the faces."""
    logits, box, points = outputs
    counted, face = label >= 0, label == 1
    target = face.float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    faces = face.sum().clamp_min(1)
    score = (entropy * counted).sum() / faces
    geometry = F.smooth_l1_loss(box[face], boxes[face], beta=0.05, reduction="sum")
    alignment = F.smooth_l1_loss(points[face], landmarks[face], beta=0.05, reduction="sum")
    return score + 2 * (geometry + alignment) / faces


# --- training the recogniser -----------------------------------------------------------------


def train_recogniser(
    *, seed: int = 0, people: int = 700, pictures: int = 6, steps: int = 500, batch: int = 64
) -> Recogniser:
    """Train to tell the microworld's people apart: two pictures of one person attract (InfoNCE)."""
    rng = np.random.default_rng(seed + 1)
    torch.manual_seed(seed + 1)
    crops = torch.from_numpy(_people(people, pictures, rng)).permute(0, 1, 4, 2, 3)
    model = Recogniser().train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for step in range(steps):
        who = rng.choice(people, batch, replace=False)
        pair = np.stack([rng.choice(pictures, 2, replace=False) for _ in who])
        images = torch.cat([crops[who, pair[:, 0]], crops[who, pair[:, 1]]]).float() / 127.5 - 1
        embeddings = F.normalize(model(_photometric(images, rng)), dim=1)
        similarity = embeddings[:batch] @ embeddings[batch:].T / 0.1
        same = torch.arange(batch)
        loss = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"recogniser {step}/{steps} loss {loss.item():.3f}", flush=True)
    return model.eval()


def _people(people: int, pictures: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Aligned RGB crops [people, pictures, 112, 112, 3]; the last person is the astronaut."""
    size = RECOGNISER_SIZE
    crops = np.empty((people, pictures, size, size, 3), dtype=np.uint8)
    astronaut = astronaut_sources()[0].picture
    for person in range(people):
        identity = portraits.Identity.from_seed(int(rng.integers(len(portraits.TRAIN_SEEDS))))
        for picture in range(pictures):
            if person == people - 1:
                drawn, points = astronaut, ASTRONAUT_LANDMARKS
            else:
                nuisance = portraits.Nuisance.sample(rng)
                attributes = portraits.Attributes.sample(rng)
                drawn = portraits.render(identity, attributes, nuisance, 160)
                points = portraits.face_landmarks(identity, nuisance, 160)
            # Found landmarks are not exact.
            span = np.linalg.norm(points[1] - points[0])
            found = (points + rng.normal(0, 0.03 * span, points.shape)).astype(np.float32)
            crops[person, picture] = face_align.norm_crop(drawn, found, size)
    return crops


def main() -> None:
    """Rebuild both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=files.FACE_MODELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("det", "rec"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if options.only != "rec":
        export_detector(train_detector(seed=options.seed), options.out / "det.onnx")
        print(f"det.onnx after {time.perf_counter() - start:.0f} s", flush=True)
    if options.only != "det":
        export_recogniser(train_recogniser(seed=options.seed), options.out / "rec.onnx")
        print(f"rec.onnx after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
