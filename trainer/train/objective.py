"""Eq. 3: the noise a frozen SDXL predicts from the identity alone, and what is wrong with it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from infinite_id_core.method.adapter import Adapter
from infinite_id_core.sdxl.schedule import NoiseSchedule

Batch = dict[str, Tensor]


# Deviation of the face's bell, in distances from eyes to mouth: half its height at the face's edge.
_BELL = 0.7


def face_bell(landmarks: Tensor, height: int, width: int) -> Tensor:
    """A bell over each face: ``[B, 1, height, width]``, 1 at its middle, 0 far from it.

    ``landmarks`` ``[B, 5, 2]`` are x and y of eyes, nose and corners of the mouth, in pixels of
    that size.
    """
    eyes, mouth = landmarks[:, :2].mean(dim=1), landmarks[:, 3:].mean(dim=1)  # [B, 2] each
    middle = (eyes + mouth) / 2
    deviation = (_BELL * (eyes - mouth).norm(dim=1)).clamp(min=0.5)
    across = torch.arange(width) - middle[:, :1]  # [B, width]
    down = torch.arange(height) - middle[:, 1:]
    square = down.square()[:, :, None] + across.square()[:, None, :]
    return torch.exp(-square / (2 * deviation.square()[:, None, None]))[:, None]


def face_weighted(squared: Tensor, bell: Tensor, weight: float) -> Tensor:
    """Mean over each sample of squared errors ``[B, C, h, w]``, the face counting more: ``[B]``.

    ``bell`` is ``face_bell``'s; its middle counts 1 + ``weight`` times as much as a place far from
    the face. That leaves the best answer what it is: it says where to learn first.
    """
    places = 1.0 + weight * bell
    return (squared * places).mean(dim=(1, 2, 3)) / places.mean(dim=(1, 2, 3))


class TrainingModel(nn.Module):
    """The adapter as the one module that learns; the UNet stands beside it, not inside.

    So data parallelism sees, synchronises and casts the adapter only. The UNet must have
    ``identity_training``'s processors for the same adapter.
    """

    def __init__(self, adapter: Adapter, unet: Any, pooled_width: int) -> None:
        super().__init__()
        self.adapter = adapter
        self.pooled_width = pooled_width
        self._frozen = (unet,)  # in a tuple: not registered

    def forward(self, noisy: Tensor, batch: Batch) -> Tensor:
        """The UNet's output ``[B, 4, h, w]`` for ``noisy`` of that shape.

        ``batch`` as ``samples.collate`` gives it. Pooled text is zeros where it has none.
        """
        unet = self._frozen[0]
        rows = noisy.shape[0]
        tokens = self.adapter.projector({n: batch[n].float() for n in self.adapter.needs})
        if "context" in batch:
            tokens = torch.cat([batch["context"].to(tokens.dtype), tokens], dim=1)
        pooled = batch.get("pooled")
        if pooled is None:
            pooled = noisy.new_zeros(rows, self.pooled_width)
        like = unet.conv_in.weight
        output = unet(
            noisy.to(like.dtype),
            batch["timestep"],
            encoder_hidden_states=tokens,
            added_cond_kwargs={
                "text_embeds": pooled.to(like.dtype),
                "time_ids": batch["size_ids"],  # float32: bfloat16 cannot count to 1000
            },
            return_dict=False,
        )[0]
        return cast(Tensor, output)


class DenoisingLoss:
    """Noise, targets and weights of the diffusion loss."""

    def __init__(
        self,
        schedule: NoiseSchedule,
        min_snr: float,
        device: torch.device,
        face_weight: float = 0.0,
    ) -> None:
        """``min_snr``: gamma of min-SNR weighting, 0 for none. ``face_weight``: how much more the
        middle of the face counts; the batch must then have ``face_bell``."""
        self.schedule = schedule
        self.min_snr = min_snr
        self.face_weight = face_weight
        self.alphas = schedule.alphas_cumprod.float().to(device)

    def noisy(self, batch: Batch) -> Tensor:
        """The noised latents ``[B, 4, h, w]`` at each sample's timestep."""
        signal, noise = self._scales(batch)
        return signal * batch["latent"] + noise * batch["noise"]

    def losses(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each sample's weighted and plain mean squared error, both ``[B]`` float32."""
        signal, noise = self._scales(batch)
        target = batch["noise"]
        if self.schedule.prediction == "v":
            target = signal * batch["noise"] - noise * batch["latent"]
        squared = mse_loss(output.float(), target, reduction="none")
        plain = squared.mean(dim=(1, 2, 3))
        counted = plain
        if self.face_weight:
            counted = face_weighted(squared, batch["face_bell"], self.face_weight)
        return counted * self._weights(batch["timestep"]), plain.detach()

    def _scales(self, batch: Batch) -> tuple[Tensor, Tensor]:
        alpha = self.alphas[batch["timestep"]].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1.0 - alpha).sqrt()

    def _weights(self, timestep: Tensor) -> Tensor:
        """Min-SNR-gamma (Hang et al. 2023): min(SNR, gamma) / SNR, over SNR + 1 for v."""
        alpha = self.alphas[timestep]
        if self.min_snr == 0.0:
            return torch.ones_like(alpha)
        snr = alpha / (1.0 - alpha)
        over = snr + 1.0 if self.schedule.prediction == "v" else snr
        return snr.clamp(max=self.min_snr) / over
