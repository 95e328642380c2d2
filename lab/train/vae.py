"""The autoencoder: TAESD's layout with narrow stages, written out at TAESD's full 64 channels.

A stage of w < 64 channels equals a 64-channel stage whose other channels are zero, so the narrow
net is trained (cheap at 128 px) and stored, and `widen` gives the standard TAESD tensors, under
ComfyUI's keys, that compute the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from microworld.portraits import Picture

from .data import generator, sample, to_tensor
from .loop import LoopOptions, arithmetic, load_checkpoint, save_atomic, train
from .pictures import Pictures

SDXL_SCALE = 0.13025  # what SDXL's latent format multiplies by; our latents are unit scale after it
ENCODER_WIDTHS = (16, 24, 48, 64)  # at 1, 1/2, 1/4, 1/8 of the picture's size
DECODER_WIDTHS = (64, 64, 32, 24)  # at 1/8, 1/4, 1/2, 1
OPTIONS = LoopOptions(steps=1400, rate=1.5e-3, warmup=100, ema=0.99)
DECODER_OPTIONS = LoopOptions(steps=200, rate=1.2e-3, warmup=50, ema=0.99)
BATCH = 16
WHOLE_BATCH = 6
SHARD = 2_000  # pictures in a file of cached latents
CROP = 64  # pixels; a convolutional net learns from crops, and four times the steps help more


def _conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)  # type: ignore[arg-type]


class Clamp(nn.Module):
    """TAESD's soft clamp to (-3, 3)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """TAESD's residual block of three convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x) + x)


def encoder(widths: tuple[int, int, int, int] = ENCODER_WIDTHS) -> nn.Sequential:
    """[B, 3, H, W] in [0, 1] to latents [B, 4, H/8, W/8]."""
    layers: list[nn.Module] = [_conv(3, widths[0]), Block(widths[0])]
    for before, width in zip(widths, widths[1:], strict=False):
        layers += [_conv(before, width, stride=2, bias=False), *(Block(width) for _ in range(3))]
    return nn.Sequential(*layers, _conv(widths[-1], 4))


def decoder(widths: tuple[int, int, int, int] = DECODER_WIDTHS) -> nn.Sequential:
    """Latents [B, 4, H/8, W/8] to [B, 3, H, W] in [0, 1]."""
    layers: list[nn.Module] = [Clamp(), _conv(4, widths[0]), nn.ReLU()]
    for width, after in zip(widths, widths[1:], strict=False):
        layers += [
            *(Block(width) for _ in range(3)),
            nn.Upsample(scale_factor=2),
            _conv(width, after, bias=False),
        ]
    return nn.Sequential(*layers, Block(widths[-1]), _conv(widths[-1], 3))


class Autoencoder(nn.Module):
    """Encoder and decoder under ComfyUI's names."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_encoder = encoder()
        self.taesd_decoder = decoder()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, Block):  # near-identity blocks: there are no norms to help
                nn.init.kaiming_normal_(module.conv[4].weight, a=5.0)
                module.conv[4].weight.data[:3] *= 0.1
        self._start_as_colour_pyramid()

    @torch.no_grad()
    def _start_as_colour_pyramid(self) -> None:
        """Let channels 0-2 carry 8 x 8 mean colours from end to end.

        Without this the first thousands of steps find only brightness.
        """
        first, *strided, last = [m for m in self.taesd_encoder if isinstance(m, nn.Conv2d)]
        _pass_on(first, kernel=None)
        for conv in strided:
            _pass_on(conv, kernel=torch.tensor([0.0, 0.5, 0.5]))
        opponent = torch.tensor([[4 / 3, 4 / 3, 4 / 3], [3.0, 0.0, -3.0], [-2.5, 5.0, -2.5]])
        last.weight.mul_(0.1)
        last.weight[:3, :3] = 0.0
        last.weight[:3, :3, 1, 1] = opponent
        last.bias[:3] = torch.tensor([-2.0, 0.0, 0.0])
        first, *rising, last = [m for m in self.taesd_decoder if isinstance(m, nn.Conv2d)]
        back = torch.linalg.inv(opponent)
        first.weight[:3] = 0.0
        first.weight[:3, :3, 1, 1] = back
        first.bias[:3] = back @ torch.tensor([2.0, 0.0, 0.0])
        for conv in rising:
            _pass_on(conv, kernel=None)
        _pass_on(last, kernel=None)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] to unit-scale latents."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unit-scale latents to [B, 3, H, W] about [0, 1]."""
        return self.taesd_decoder(latents)


def _pass_on(conv: nn.Conv2d, kernel: torch.Tensor | None) -> None:
    """Channels 0-2 out are channels 0-2 in, averaged by `kernel` (rows and columns) or alone."""
    one = torch.tensor([0.0, 1.0, 0.0]) if kernel is None else kernel
    conv.weight[:3] *= 0.1
    conv.weight[:3, :3] = 0.0
    for channel in range(3):
        conv.weight[channel, channel] = one[:, None] * one[None, :]
    if conv.bias is not None:
        conv.bias[:3] = 0.0


def _loss(model: Autoencoder, step: int) -> tuple[torch.Tensor, dict[str, float]]:
    rng = generator("vae", step)
    pictures = to_tensor([_crop(sample(rng).picture, rng) for _ in range(BATCH)])
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    noise = torch.from_numpy(rng.standard_normal((BATCH, 4, *_latent(pictures)), dtype="float32"))
    with arithmetic():
        latents = model.encode(pictures)
        # A little noise makes neighbouring latents decode alike, which diffusion needs.
        made = model.decode(latents + 0.06 * noise)
    made, latents = made.float(), latents.float()
    error, slopes = _errors(made, pictures)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    unit = mean.square().mean() + (std - 1).square().mean()
    loss = 10 * error + 5 * slopes + 0.02 * unit
    return loss, {"mse": float(error.detach()), "std": float(std.detach().mean())}


def _errors(made: torch.Tensor, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors of pictures and of their differences between neighbours.

    Squares, not absolutes: a sparse detail's median is its ground, and gives no gradient.
    """
    across = F.mse_loss(made.diff(dim=3), pictures.diff(dim=3))
    down = F.mse_loss(made.diff(dim=2), pictures.diff(dim=2))
    return F.mse_loss(made, pictures), across + down


def _crop(picture: Picture, rng: np.random.Generator) -> Picture:
    # Both coordinates from a triangle: the face is in the middle and matters most.
    top, left = rng.integers(0, (picture.shape[0] - CROP) // 2 + 1, size=(2, 2)).sum(axis=0)
    return picture[top : top + CROP, left : left + CROP]


def _latent(pictures: torch.Tensor) -> tuple[int, int]:
    return pictures.shape[2] // 8, pictures.shape[3] // 8


def run(folder: Path, options: LoopOptions = OPTIONS) -> Autoencoder:
    """Train, or load what is trained. The encoder is final, the decoder a first one."""
    torch.manual_seed(0)
    model = Autoencoder().to(memory_format=torch.channels_last)
    model.load_state_dict(train("vae", folder, model, lambda s: _loss(model, s), options))
    _to_unit_scale(model)
    return model.eval()


@torch.no_grad()
def _to_unit_scale(model: Autoencoder) -> None:
    """Scale the latents' channels to mean 0, deviation 1 over a set of pictures.

    The decoder's first convolution undoes it as far as the clamp before it allows.
    """
    rng = generator("unit scale")
    latents = model.encode(to_tensor([sample(rng).picture for _ in range(256)]))
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    last, first = model.taesd_encoder[14], model.taesd_decoder[1]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)
    first.bias.add_((first.weight.sum(dim=(2, 3)) * mean).sum(dim=1))
    first.weight.mul_(std[None, :, None, None])


@torch.no_grad()
def latents(folder: Path, vae: Autoencoder, data: Pictures) -> torch.Tensor:
    """Encode the training set, float16 [N, 4, 16, 16]; in shards, so that it resumes."""
    shards = []
    for start in tqdm(range(0, len(data), SHARD), desc="latents"):
        path = folder / "latents" / f"{start:06d}.pt"
        if not path.exists():
            batches = data.pictures[start : start + SHARD].split(50)
            rows = [_encode(vae, batch) for batch in batches]
            save_atomic(path, {"latents": torch.cat(rows)})
        shards.append(load_checkpoint(path)["latents"])
    return torch.cat(shards)


def _encode(vae: Autoencoder, pictures: torch.Tensor) -> torch.Tensor:
    # BHWC -> BCHW, in channels-last memory, which the convolutions prefer.
    batch = (pictures.permute(0, 3, 1, 2).float() / 255).contiguous(
        memory_format=torch.channels_last
    )
    with arithmetic():
        return vae.encode(batch).half().contiguous()


def refine_decoder(
    folder: Path,
    model: Autoencoder,
    data: Pictures,
    encoded: torch.Tensor,
    options: LoopOptions = DECODER_OPTIONS,
) -> Autoencoder:
    """Train the decoder on, on whole pictures and the very latents the UNet learns to make."""
    model.taesd_encoder.requires_grad_(False)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = generator("vae decoder", step)
        rows = rng.integers(len(data), size=WHOLE_BATCH)
        latents = encoded[rows].float()
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype="float32"))
        pictures = data.pictures[rows].permute(0, 3, 1, 2).float() / 255  # BHWC -> BCHW
        with arithmetic():
            made = model.decode(latents + 0.05 * noise)
        error, slopes = _errors(made.float(), pictures)
        return 10 * error + 5 * slopes, {"mse": float(error.detach())}

    model.load_state_dict(train("vae_decoder", folder, model, loss, options))
    return model.eval()


def widen(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The narrow tensors padded with zeros to TAESD's, with `vae_scale` for SDXL's latent format.

    ComfyUI computes encode(x) = encoder(x) / vae_scale, and SDXL's format multiplies by the same
    number: the diffusion model sees unit-scale latents.
    """
    wide: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        size = [
            v if v in (3, 4) and d < 2 and _is_edge(key, d) else (64 if d < 2 else v)
            for d, v in enumerate(value.shape)
        ]
        padded = torch.zeros(size, dtype=value.dtype)
        padded[tuple(slice(0, v) for v in value.shape)] = value
        wide[key] = padded
    wide["vae_scale"] = torch.tensor(SDXL_SCALE)
    wide["vae_shift"] = torch.tensor(0.0)
    return wide


def _is_edge(key: str, dimension: int) -> bool:
    """Whether this dimension is the picture's 3 or the latent's 4 channels."""
    part, index = key.split(".")[:2]
    first = {"taesd_encoder": "0", "taesd_decoder": "1"}[part]
    last = {"taesd_encoder": "14", "taesd_decoder": "19"}[part]
    return (index == first and dimension == 1) or (index == last and dimension == 0)
