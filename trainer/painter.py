"""From models, photos and prompts to pictures, without ComfyUI: everything here paints this way.

The two streams on diffusers' UNet, with the same arithmetic and the same noise for a seed as the
nodes in ComfyUI (sampler ``euler`` or ``ddim``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infinite_id_core.encoders.encode import EncodeOptions, encode_faces
from infinite_id_core.encoders.eva import EvaVision, load_eva
from infinite_id_core.encoders.references import (
    ImageEncoder,
    Reference,
    image_encoder_of,
    needs_face,
    read_references,
    references_of,
)
from infinite_id_core.errors import EncoderError, NoFaceError, OptionError
from infinite_id_core.faces.align import AlignedFace
from infinite_id_core.faces.find import FaceOptions, find_faces
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.hosts.diffusers_sample import (
    AppliedIdentity,
    NegativePass,
    Progress,
    Prompt,
    SamplingOptions,
    sample,
)
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.attention import StreamOptions
from infinite_id_core.method.face_clip import CLIP, FACE
from infinite_id_core.method.identity import Identity
from infinite_id_core.method.published import EVA_CLIP
from infinite_id_core.method.records import AdapterConfig

from .models.face_models import face_pack
from .models.image_encoder import load_image_encoder
from .models.source import MICROWORLD, source_of
from .models.text import load_text_encoders
from .models.unet import LoadedUNet, load_unet
from .models.unet_names import HEAD_WIDTH
from .models.vae import STRIDE, Autoencoder, load_vae

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEXTS = 16  # encoded at a time


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the base model comes from; each may be ``microworld``."""

    unet: str
    vae: str = ""
    """Empty: the one inside ``unet``; as ``text_encoders``."""
    text_encoders: str = ""
    head_width: int = HEAD_WIDTH


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What to draw. Raises ``OptionError``."""

    width: int = 1024
    height: int = 1024
    seed: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.width % STRIDE or self.height % STRIDE or min(self.width, self.height) < 64:
            raise OptionError(
                f"Width and height must be multiples of {STRIDE} from 64 on, got {self.width} x "
                f"{self.height}."
            )
        if not 1 <= self.count <= 64:
            raise OptionError(f"count must lie in [1, 64], got {self.count}.")

    def noise(self) -> Tensor:
        """``[count, 4, h, w]``, as ComfyUI draws it for the same seed."""
        size = (self.count, 4, self.height // STRIDE, self.width // STRIDE)
        return torch.randn(size, generator=torch.manual_seed(self.seed))


@dataclass(frozen=True, kw_only=True)
class Painter:
    """A UNet and its autoencoder on one device."""

    loaded: LoadedUNet
    vae: Autoencoder
    device: torch.device

    def paint(
        self,
        prompt: Prompt,
        negative: Prompt,
        noise: Tensor,
        applied: Sequence[AppliedIdentity] = (),
        *,
        options: StreamOptions | None = None,
        sampling: SamplingOptions | None = None,
        negative_pass: NegativePass | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Pictures ``[n, 3, H, W]`` in [0, 1] of ``noise [n, 4, h, w]``, on the CPU.

        Raises as ``sample``.
        """
        latents = sample(
            self.loaded.unet,
            applied,
            prompt,
            negative,
            noise.to(self.device),
            options=options,
            negative_pass=negative_pass,
            sampling=sampling,
            schedule=self.loaded.schedule,
            progress=progress,
        )
        return self.vae.decode(latents).cpu()


def load_painter(
    sources: Sources, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Painter:
    """Both models on ``device``, the UNet in ``dtype``. Raises what loading them raises."""
    loaded = load_unet(sources.unet, dtype=dtype, head_width=sources.head_width)
    loaded.unet.to(device)
    vae = load_vae(sources.vae or sources.unet)
    vae.module.to(device)
    return Painter(loaded=loaded, vae=vae, device=torch.device(device))


def load_adapter(source: str) -> Adapter:
    """An adapter in float32, without gradients. Raises a subclass of ``FileError``."""
    return read_adapter(source_of(source, "adapter").path).float().requires_grad_(False)


def encode_texts(
    sources: Sources, texts: Sequence[str], device: str | torch.device = "cpu"
) -> dict[str, Prompt]:
    """Each text's prompt; the encoders are let go. Raises what loading them raises."""
    encoders = load_text_encoders(sources.text_encoders or sources.unet).to(torch.device(device))
    texts, found = list(dict.fromkeys(texts)), dict[str, Prompt]()
    for start in range(0, len(texts), _TEXTS):
        some = texts[start : start + _TEXTS]
        both = encoders.encode(some)
        for number, text in enumerate(some):
            row = slice(number, number + 1)
            found[text] = Prompt(context=both.context[row], pooled=both.pooled[row])
    return found


def joined(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts as the rows of one."""
    return Prompt(
        context=torch.cat([prompt.context for prompt in prompts]),
        pooled=torch.cat([prompt.pooled for prompt in prompts]),
    )


class IdentityReader:
    """Photos to identities, with the encoders that an adapter names; each is loaded once."""

    def __init__(self, face_models: str | Path | Any = MICROWORLD, clip_weights: str = "") -> None:
        """``face_models``: a pack's folder, ``microworld``, or insightface's ``FaceAnalysis``."""
        self._source = face_models
        self._clip_weights = clip_weights
        self._encoders: dict[str, ImageEncoder] = {}

    @cached_property
    def _faces(self) -> Any:
        named = isinstance(self._source, str | Path)
        return face_pack(self._source) if named else self._source

    def read(
        self,
        adapter: Adapter,
        photos: Mapping[str, Tensor],
        finding: FaceOptions | None = None,
        options: EncodeOptions | None = None,
    ) -> Identity:
        """One person of ``photos [H, W, 3]`` in [0, 1], by names for messages.

        ``finding`` says which faces (default: the largest of each photo), ``options`` how they
        are read (default: as the adapter reads them). No face is looked for where the adapter
        needs none. Raises ``NoFaceError``, and what loading the encoders raises.
        """
        finding, encoder = finding or FaceOptions(), self._encoder(image_encoder_of(adapter))
        if adapter.needs.keys() == {FACE, CLIP} and isinstance(adapter.config, AdapterConfig):
            faces = [f for name, photo in photos.items() for f in self._found(name, photo, finding)]
            assert encoder is not None and not isinstance(encoder, EvaVision)
            return encode_faces(faces, encoder, options or EncodeOptions.of_needs(adapter.needs))
        if needs_face([adapter]):
            faces = [f for name, photo in photos.items() for f in self._found(name, photo, finding)]
            references = references_of(faces)
        else:
            references = [Reference(photo=photo) for photo in photos.values()]
        return read_references(references, [adapter], encoder)

    def _found(self, name: str, photo: Tensor, finding: FaceOptions) -> tuple[AlignedFace, ...]:
        try:
            return find_faces(self._faces, photo, finding).chosen
        except NoFaceError as error:
            raise NoFaceError(f"{name}: {error}") from error

    def _encoder(self, model: str | None) -> ImageEncoder | None:
        if model is None:
            return None
        if model not in self._encoders:
            self._encoders[model] = _image_encoder(model, self._clip_weights)
        return self._encoders[model]


def _image_encoder(model: str, weights: str) -> ImageEncoder:
    if model != EVA_CLIP:
        return load_image_encoder(model, weights)
    if not weights:
        raise EncoderError(
            f"This adapter reads {EVA_CLIP}. Give its file, e.g. EVA02_CLIP_L_336_psz14_s6B.pt, as "
            "--clip-weights."
        )
    return load_eva(weights)
