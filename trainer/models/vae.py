"""SDXL's autoencoder, from what people have on disk, offline: pixels to the UNet's latents."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from infinite_id_core.errors import FileMissingError, ModelMismatchError, NotFiniteError

from ..files import read_json, sampled_sha256
from .source import source_of

STRIDE = 8  # pixels per latent pixel

# SDXL's; a single file does not say so itself.
_SDXL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
_LDM_END = "encoder.down.0.block.0.conv1.weight"
_TINY_END = "taesd_encoder.0.weight"


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Pixels in [0, 1] and the UNet's latents, both ways, in float32."""

    module: Any
    """diffusers' ``AutoencoderKL`` or ``AutoencoderTiny``."""
    fingerprint: str

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> ``[B, 4, H / 8, W / 8]``; the distribution's middle."""
        config = self.module.config
        encoded = self.module.encode(pixels.to(self._like) * 2 - 1)
        if hasattr(encoded, "latent_dist"):
            shift = getattr(config, "shift_factor", None) or 0.0
            return cast(Tensor, (encoded.latent_dist.mode() - shift) * config.scaling_factor)
        return cast(Tensor, encoded.latents * config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """``[B, 4, h, w]`` -> ``[B, 3, 8 h, 8 w]`` in [0, 1], one picture at a time."""
        config = self.module.config
        shift = getattr(config, "shift_factor", None) or 0.0
        pictures = [
            self.module.decode(latent[None].to(self._like) / config.scaling_factor + shift).sample
            for latent in latents
        ]
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    @property
    def _like(self) -> Tensor:
        return cast(Tensor, next(iter(self.module.parameters())))


def load_vae(source: str | Path) -> Autoencoder:
    """The autoencoder of a checkpoint, a VAE file, a diffusers folder, or ``"microworld"``.

    Raises ``ModelMismatchError`` for a file without one, subclasses of ``FileError``.
    """
    place = source_of(source, "vae")
    if place.is_folder:
        module = _from_folder(_folder(place.path))
    else:
        with place.opened() as file:
            read = partial(file.tensor, dtype=torch.float32)
            module = _from_file(place.path, file.shapes, read)
    module.eval().requires_grad_(False).float()
    if not all(bool(t.isfinite().all()) for t in module.state_dict().values()):
        raise NotFiniteError(source, "the autoencoder's weights hold NaN or infinity.")
    return Autoencoder(module=module, fingerprint=vae_fingerprint(source))


def check_vae(source: str | Path) -> None:
    """Find the autoencoder, with names and shapes, without reading its weights.

    Raises as ``load_vae``.
    """
    place = source_of(source, "vae")
    if place.is_folder:
        _folder(place.path)
        return
    shapes = place.shapes()
    _from_file(place.path, shapes, lambda name: torch.empty(shapes[name], device="meta"))


def vae_fingerprint(source: str | Path) -> str:
    """Changes when the weights do; without loading them."""
    place = source_of(source, "vae")
    if place.is_folder:
        return sampled_sha256(*sorted(_folder(place.path).glob("*.safetensors")))
    return sampled_sha256(place.path)


def _from_file(path: Path, names: Collection[str], read: Callable[[str], Tensor]) -> Any:
    """The module of a file with these tensors, each as ``read`` gives it."""
    prefix, tiny = _kind(path, names)
    state = {name.removeprefix(prefix): read(name) for name in names if name.startswith(prefix)}
    try:
        return _tiny(state) if tiny else _full(state)
    except (RuntimeError, LookupError) as error:
        raise ModelMismatchError(f"{path}: its autoencoder is not SDXL's ({error}).") from error


def _kind(path: Path, names: Collection[str]) -> tuple[str, bool]:
    """The prefix of a file's VAE, and whether it is TAESD-shaped."""
    for end, tiny in ((_LDM_END, False), (_TINY_END, True)):
        found = [name for name in names if name.endswith(end)]
        if len(found) == 1:
            return found[0].removesuffix(end), tiny
    raise ModelMismatchError(
        f"{path}: no autoencoder was found among its {len(names)} tensors. Give SDXL's VAE as "
        "model.vae: a checkpoint that holds it, a VAE file as ComfyUI loads it, or a diffusers "
        "folder."
    )


def _full(state: dict[str, Tensor]) -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    build: Any = diffusers.AutoencoderKL
    with torch.device("meta"):
        module = build(**_SDXL)
    convert: Any = convert_ldm_vae_checkpoint
    converted = convert(state, module.config)
    module.load_state_dict(converted, assign=True)
    return module


def _tiny(state: Mapping[str, Tensor]) -> Any:
    """TAESD in ComfyUI's names (``taesd_encoder.0.weight``)."""
    import diffusers

    build: Any = diffusers.AutoencoderTiny
    with torch.device("meta"):
        module = build(scaling_factor=1.0)
    renamed = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"taesd_(encoder|decoder)\.(\d+)\.(.+)", name)
        if match:
            # TAESD counts the decoder's clamp as its first layer; diffusers does not.
            number = int(match[2]) - (match[1] == "decoder")
            renamed[f"{match[1]}.layers.{number}.{match[3]}"] = tensor
    module.load_state_dict(renamed, assign=True)
    return module


def _folder(folder: Path) -> Path:
    for candidate in (folder / "vae", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileMissingError(folder, "expected a diffusers folder with vae/config.json in it.")


def _from_folder(folder: Path) -> Any:
    import diffusers

    config = read_json(folder / "config.json")
    kind: Any = (
        diffusers.AutoencoderTiny if "AutoencoderTiny" in str(config) else diffusers.AutoencoderKL
    )
    return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
