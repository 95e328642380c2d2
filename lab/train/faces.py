"""The recogniser, the scorer, and the attribute reader.

The recogniser conditions adapters. The scorer only judges: it has another architecture, another
objective's weights and another seed, and nothing is ever conditioned on it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from insightface.utils import face_align
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from microworld.config import FACE_WIDTH, IMAGE_SIZE, RECOGNISER_SIZE
from microworld.portraits import ATTRIBUTE_SIZES

from ..face_networks import ConvNorm, Recogniser, Separable
from .data import generator
from .loop import LoopOptions, train
from .pictures import EACH, Pictures

RECOGNISER_OPTIONS = LoopOptions(steps=2600, rate=4e-3, warmup=50, weight_decay=1e-3)
SCORER_OPTIONS = LoopOptions(steps=1500, rate=3e-3, warmup=50, weight_decay=1e-3)
READER_OPTIONS = LoopOptions(steps=600, rate=4e-3, warmup=50, weight_decay=1e-3)
PEOPLE_A_STEP = 64
READ_A_STEP = 64
TEMPERATURE = 0.1


class Crops:
    """Aligned faces of the training pictures, cut out on demand."""

    def __init__(self, data: Pictures) -> None:
        self.data = data

    @cached_property
    def matrices(self) -> NDArray[np.float64]:
        """[N, 2, 3]: picture to ArcFace's 112 px crop."""
        points = self.data.landmarks.numpy()
        return np.stack([face_align.estimate_norm(p, RECOGNISER_SIZE) for p in points])

    def batch(
        self,
        rows: NDArray[np.int64],
        rng: np.random.Generator,
        *,
        size: int = RECOGNISER_SIZE,
        padding: float = 0.0,
    ) -> torch.Tensor:
        """Crops [B, 3, size, size] in [0, 1], RGB, a little off as found landmarks are."""
        scale = size / (RECOGNISER_SIZE * (1 + 2 * padding))
        cut = []
        for row in rows.tolist():
            matrix = self.matrices[row] + [[0, 0, padding * RECOGNISER_SIZE]] * 2
            matrix = _jittered(matrix, rng, RECOGNISER_SIZE * (0.5 + padding)) * scale
            picture = self.data.pictures[row].numpy()
            cut.append(cv2.warpAffine(picture, matrix, (size, size)))
        # BHWC -> BCHW
        return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255


def _jittered(
    matrix: NDArray[np.float64], rng: np.random.Generator, centre: float
) -> NDArray[np.float64]:
    """[2, 3] followed by a small turn, growth and shift about the crop's centre, in its pixels."""
    angle, grow = rng.normal(0, 0.03), 1 + rng.normal(0, 0.03)
    c, s = np.cos(angle) * grow, np.sin(angle) * grow
    moved = np.array([[c, -s], [s, c]]) @ (matrix - [[0, 0, centre]] * 2)
    moved[:, 2] += centre + rng.normal(0, 1.5, 2)
    return moved


def worn(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Light, tint, noise and loss of detail differ at every showing; [B, 3, H, W] in [0, 1]."""
    count, size = images.shape[0], images.shape[-1]
    if rng.random() < 0.5:  # as an autoencoder or a small original would blur it
        small = int(size * rng.uniform(0.35, 0.9))
        images = F.interpolate(images, size=(small, small), mode="area")
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    gain = _each(rng.uniform(0.8, 1.2, (count, 1, 1, 1)))
    tint = _each(rng.uniform(-0.06, 0.06, (count, 3, 1, 1)))
    noise = _each(rng.uniform(0, 0.05, (count, 1, 1, 1)))
    grain = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return (images * gain + tint + noise * grain).clamp(0, 1)


def _each(values: NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def pairs(rng: np.random.Generator, data: Pictures, count: int) -> NDArray[np.int64]:
    """Rows of two pictures each of `count` people: [2 * count], the first pictures first."""
    people = rng.choice(len(data) // EACH, count, replace=False)
    picks = np.stack([rng.choice(EACH, 2, replace=False) for _ in people])
    return np.concatenate([people * EACH + picks[:, 0], people * EACH + picks[:, 1]])


def contrast(
    embeddings: torch.Tensor, temperature: float = TEMPERATURE
) -> tuple[torch.Tensor, dict[str, float]]:
    """InfoNCE between the halves of [2B, D]: the same person's pictures attract."""
    first, second = F.normalize(embeddings.float(), dim=1).chunk(2)
    cosine = first @ second.T
    same = torch.arange(len(first))
    loss = F.cross_entropy(cosine / temperature, same)
    loss = (loss + F.cross_entropy(cosine.T / temperature, same)) / 2
    hit = (cosine.argmax(dim=1) == same).float().mean()
    return loss, {"same": float(cosine.diagonal().mean().detach()), "hit": float(hit)}


class WithTraits(nn.Module):
    """A recogniser whose normed embedding must also tell the twelve traits, linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.recogniser = Recogniser()
        self.traits = nn.Linear(FACE_WIDTH, 12)


class Scorer(Recogniser):
    """Plain convolutions, wider and without residuals; same input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(3, 24, stride=2),
            ConvNorm(24, 40, stride=2),
            ConvNorm(40, 64, stride=2),
            ConvNorm(64, 64),
            ConvNorm(64, 96, stride=2),
            ConvNorm(96, 96),
            ConvNorm(96, 96, 7, groups=96, relu=False),
        )


class AttributeReader(nn.Module):
    """Picture [B, 3, 128, 128] in -1..1 to the logits of all attributes [B, 19], in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(3, 16, stride=2),
            ConvNorm(16, 32, stride=2),
            Separable(32, 3),
            ConvNorm(32, 64, stride=2),
            Separable(64),
            ConvNorm(64, 96, stride=2),
            Separable(96),
            ConvNorm(96, 96, IMAGE_SIZE // 16, groups=96, relu=False),
        )
        self.embed = nn.Linear(96, sum(ATTRIBUTE_SIZES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        # The even 8x8 kernel pads to 9x9; the value at (4, 4) sees exactly the 8x8 map.
        return self.embed(self.body(x)[:, :, 4, 4])


def recogniser(
    folder: Path, data: Pictures, options: LoopOptions = RECOGNISER_OPTIONS
) -> nn.Module:
    """Train E_face, or load what is trained."""
    torch.manual_seed(2)
    model, crops = WithTraits(), Crops(data)
    target = data.traits

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = generator("recogniser", step)
        rows = pairs(rng, data, PEOPLE_A_STEP)
        embeddings = model.recogniser(worn(crops.batch(rows, rng), rng) * 2 - 1)
        told, numbers = contrast(embeddings)
        read = model.traits(F.normalize(embeddings, dim=1) * 8)
        traits = F.mse_loss(read, target[rows])
        return told + 10 * traits, {**numbers, "traits": float(traits.detach())}

    model.load_state_dict(train("recogniser", folder, model, loss, options))
    return model.recogniser.eval()


def scorer(folder: Path, data: Pictures, options: LoopOptions = SCORER_OPTIONS) -> nn.Module:
    """Train the judge, or load what is trained."""
    torch.manual_seed(3)
    model, crops = Scorer(), Crops(data)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = generator("scorer", step)
        rows = pairs(rng, data, PEOPLE_A_STEP)
        return contrast(model(worn(crops.batch(rows, rng), rng) * 2 - 1))

    model.load_state_dict(train("scorer", folder, model, loss, options))
    return model.eval()


def attribute_reader(
    folder: Path, data: Pictures, options: LoopOptions = READER_OPTIONS
) -> nn.Module:
    """Train the reader of backgrounds, styles, expressions and accessories."""
    torch.manual_seed(4)
    model = AttributeReader()

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = generator("attributes", step)
        rows = rng.integers(len(data), size=READ_A_STEP)
        images = data.pictures[rows].permute(0, 3, 1, 2).float() / 255  # BHWC -> BCHW
        logits = model(worn(images, rng) * 2 - 1).split(ATTRIBUTE_SIZES, dim=1)
        wanted = data.attributes[rows].unbind(dim=1)
        both = list(zip(logits, wanted, strict=True))
        total = torch.stack([F.cross_entropy(x, y) for x, y in both]).sum()
        right = torch.stack([(x.argmax(dim=1) == y).float().mean() for x, y in both]).mean()
        return total, {"right": float(right)}

    model.load_state_dict(train("attributes", folder, model, loss, options))
    return model.eval()
