"""The embedded detector's and recogniser's networks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from microworld.config import FACE_WIDTH

STRIDE = 8
LEVELS = 3  # strides 8, 16, 32: the same network on the picture at 1, 1/2, 1/4
# Per anchor: the unit of its boxes, the face sizes it must find, and those where it may do either.
ANCHORS = (
    {"unit": 32.0, "find": (20.0, 56.0), "may": (16.0, 70.0)},
    {"unit": 64.0, "find": (48.0, 108.0), "may": (38.0, 135.0)},
)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, and (where asked) ReLU; the norm is folded at export."""

    def __init__(
        self, width_in: int, width: int, size: int = 3, *, stride: int = 1, dilation: int = 1,
        groups: int = 1, relu: bool = True,
    ) -> None:  # fmt: skip
        conv = nn.Conv2d(
            width_in, width, size, stride, (size // 2) * dilation, dilation, groups, bias=False
        )
        super().__init__(conv, nn.BatchNorm2d(width), *([nn.ReLU()] if relu else []))


class Separable(nn.Module):
    """A residual depthwise-pointwise block."""

    def __init__(self, width: int, size: int = 5, dilation: int = 1) -> None:
        super().__init__()
        padding = (size // 2) * dilation
        self.spatial = nn.Conv2d(width, width, size, 1, padding, dilation, groups=width)
        self.mix = ConvNorm(width, width, 1, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, c, h, w] -> the same shape."""
        return F.relu(x + self.mix(F.relu(self.spatial(x))))


class Detector(nn.Module):
    """One level of the detector: faces of 20 to 108 pixels, at stride 8.

    Larger faces are found by the same weights in the picture at half and quarter size, so it
    treats every size alike by construction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(3, 40, 7, stride=4),
            Separable(40, 3),
            ConvNorm(40, 80, stride=2),
            Separable(80),
            Separable(80, dilation=2),
            Separable(80, dilation=2),
            Separable(80, dilation=2),
            Separable(80),
        )
        self.score = nn.Conv2d(80, 2, 1)
        self.box = nn.Conv2d(80, 2 * 4, 1)
        self.landmarks = nn.Conv2d(80, 2 * 10, 1)
        nn.init.constant_(self.score.bias, -4.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """RGB [b, 3, h, w] in -1..1 -> logits [b, n, 2], boxes [b, n, 2, 4], points [b, n, 2, 10].

        n = (h / 8) (w / 8). Boxes are distances from the cell to left, top, right, bottom and
        points are offsets, both in the anchor's unit.
        """
        body = self.body(x)
        outputs = (head(body).flatten(2).mT for head in (self.score, self.box, self.landmarks))
        score, box, landmarks = outputs
        return score, box.unflatten(2, (2, 4)), landmarks.unflatten(2, (2, 10))


class Recogniser(nn.Module):
    """Aligned face to embedding, in ArcFace's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(3, 32, 7, stride=4),
            Separable(32, 3),
            ConvNorm(32, 64, stride=2),
            Separable(64, 3),
            ConvNorm(64, 96, stride=2),
            Separable(96, 3),
            Separable(96, 3),
            ConvNorm(96, 96, 7, groups=96, relu=False),
        )
        self.embed = nn.Linear(96, FACE_WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """RGB [b, 3, 112, 112] in -1..1 -> [b, 512], not normed."""
        # The 7x7 kernel over the 7x7 map is what its centre sees.
        return self.embed(self.body(x)[:, :, 3, 3])
