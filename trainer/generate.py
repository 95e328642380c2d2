"""``python -m trainer generate``: pictures of a person without ComfyUI.

The two streams on diffusers' UNet, with the same arithmetic and the same noise for a seed as the
nodes in ComfyUI (sampler ``euler`` or ``ddim``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infinite_id_core.errors import OptionError
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.identities import read_identity
from infinite_id_core.files.system import writing
from infinite_id_core.hosts.diffusers_sample import AppliedIdentity, SamplingOptions
from infinite_id_core.method.attention import MIXING, STYLE, TEXT_STREAM, StreamOptions
from infinite_id_core.sdxl.schedule import SCHEDULER

from .models.source import MICROWORLD
from .models.unet_names import HEAD_WIDTH
from .painter import (
    DTYPES,
    IdentityReader,
    Painter,
    Picture,
    Sources,
    encode_texts,
    load_adapter,
    load_painter,
)
from .photos import read_reference
from .prompts import PromptFile, read_prompts, write_prompts
from .train.memory import memory_errors

_SIDE, _EMBEDDED_SIDE = 1024, 128


def save_png(picture: Tensor, path: Path) -> None:
    """Write ``[3, H, W]`` in [0, 1] atomically. Raises ``DiskFullError``, ``NotWrittenError``."""
    pixels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    with writing(path), replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


# --- command line ----------------------------------------------------------------------------


@memory_errors("making pictures", "give a smaller --width and --height, or --device cpu")
def main(argv: Sequence[str]) -> int:
    """Make pictures, or encode prompts into a file. Returns the exit status."""
    values = _parser().parse_args(argv)
    device = values.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sources = Sources(
        unet=values.unet,
        vae=values.vae,
        text_encoders=values.text_encoders,
        head_width=values.head_width,
    )
    _check_name(values)
    prompts = _prompts(values, sources)
    if values.save_prompts:
        write_prompts(values.save_prompts, prompts)
        print(values.save_prompts)
        return 0
    _check_free(values, len(prompts.texts))
    applied = _applied(values, device)
    dtype = DTYPES[values.precision or ("fp16" if device == "cuda" else "fp32")]
    _paint(values, load_painter(sources, device, dtype), prompts, applied)
    return 0


def _paint(
    values: argparse.Namespace,
    painter: Painter,
    prompts: PromptFile,
    applied: Sequence[AppliedIdentity],
) -> None:
    side = _EMBEDDED_SIDE if values.unet == MICROWORLD else _SIDE
    picture = Picture(
        width=side if values.width is None else values.width,
        height=side if values.height is None else values.height,
        seed=values.seed,
        count=values.count,
    )
    options = StreamOptions(
        mixing=values.mixing,
        style=values.style,
        style_strength=values.style_strength,
        text_stream=values.text_stream,
    )
    sampling = SamplingOptions(
        steps=values.steps, guidance=values.guidance, scheduler=values.scheduler
    )
    for number, (text, prompt) in enumerate(zip(prompts.texts, prompts.positive, strict=True)):
        print(text, file=sys.stderr)
        with tqdm(desc="generate", dynamic_ncols=True) as bar:

            def advance(step: int, steps: int, _: Tensor, bar: Any = bar) -> None:
                bar.total = steps
                bar.update(step - bar.n)

            made = painter.paint(
                prompt,
                prompts.negative,
                picture.noise(),
                applied,
                options=options,
                sampling=sampling,
                progress=advance,
            )
        for index, one in enumerate(made):
            path = _numbered(values.output, number * picture.count + index)
            save_png(one, path)
            print(path)


def _prompts(values: argparse.Namespace, sources: Sources) -> PromptFile:
    if values.prompts:
        return read_prompts(values.prompts)
    if not values.prompt:
        raise OptionError("Give --prompt, or --prompts with a file of encoded ones.")
    encoded = encode_texts(sources, [*values.prompt, values.negative])
    return PromptFile(
        texts=tuple(values.prompt),
        negative_text=values.negative,
        positive=tuple(encoded[text] for text in values.prompt),
        negative=encoded[values.negative],
    )


def _applied(values: argparse.Namespace, device: str) -> list[AppliedIdentity]:
    """The person of --identity or --photo, if there is one."""
    if values.identity and values.photo:
        raise OptionError("Give --identity or --photo, not both.")
    if not (values.identity or values.photo):
        return []
    if not values.adapter:
        raise OptionError("A person needs --adapter, the file that training made.")
    adapter = load_adapter(values.adapter)
    if values.identity:
        identity = read_identity(values.identity)
    else:
        reader = IdentityReader(values.face_models or MICROWORLD, values.clip_weights)
        identity = reader.read(adapter, {str(values.photo): read_reference(values.photo)})
    return [
        AppliedIdentity(adapter=adapter.to(device), identity=identity, strength=values.strength)
    ]


def _check_name(values: argparse.Namespace) -> None:
    """The pictures' names end in .png. Raises ``OptionError``."""
    if not values.save_prompts and values.output.suffix.lower() != ".png":
        raise OptionError(
            f"--output is the picture's file and ends in .png; got {values.output}. A folder's "
            f"would be {values.output / 'picture.png'}."
        )


def _check_free(values: argparse.Namespace, prompts: int) -> None:
    """No picture is there already, or it may be replaced. Raises ``OptionError``."""
    outputs = (_numbered(values.output, number) for number in range(prompts * values.count))
    there = [path for path in outputs if path.exists()]
    if there and not values.overwrite:
        raise OptionError(
            f"{there[0]} is there already. Give another --output, or --overwrite to replace "
            f"{'it' if len(there) == 1 else f'these {len(there)} pictures'}."
        )


def _numbered(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.stem}_{number}{path.suffix}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer generate", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--unet", default=MICROWORLD, help="SDXL checkpoint, diffusers folder, or microworld")
    add("--vae", default="", help="autoencoder; default: the one inside --unet")
    add("--text-encoders", default="", help="default: those inside --unet")
    add("--adapter", default="", help="adapter file; without one the picture is plain SDXL's")
    add("--identity", default="", help="identity file (node Save Identity)")
    add("--photo", type=Path, help="a photo of the person, in place of --identity")
    add("--face-models", default="", help="for --photo: .../models/<pack>; default: embedded")
    add("--clip-weights", default="", help="for --photo: the image encoder the adapter names")
    add("--prompt", action="append", help="may be given several times")
    add("--negative", default="", help="negative prompt")
    add("--prompts", default="", help="file of encoded prompts, in place of --prompt")
    add("--save-prompts", default="", help="encode the prompts into this file and end")
    add(
        "--output",
        type=Path,
        default=Path("picture.png"),
        help="file of the picture, ending in .png (default: picture.png); the second one is "
        "NAME_1.png, and so on",
    )
    add("--overwrite", action="store_true", help="replace pictures that are there already")
    side = f"in pixels (default: {_SIDE}; {_EMBEDDED_SIDE} for the embedded models)"
    add("--width", type=int, help=side)
    add("--height", type=int, help=side)
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--count", type=int, default=1, help="pictures per prompt (default: 1)")
    add("--steps", type=int, default=30, help="of the sampler (default: 30)")
    add("--guidance", type=float, default=5.0, help="as cfg in ComfyUI (default: 5)")
    add("--scheduler", choices=SCHEDULER, default="normal", help="default: normal")
    add("--strength", type=float, default=1.0, help="of the person (default: 1)")
    add("--mixing", choices=MIXING, default="mixed", help="of the streams (default: mixed)")
    add("--style", choices=STYLE, default="adain_mean", help="default: adain_mean, the paper's")
    add("--style-strength", type=float, default=1.0, help="default: 1")
    add("--text-stream", choices=TEXT_STREAM, default="own", help="default: own, the paper's")
    add("--device", default="", help="default: cuda if there is one, else cpu")
    add("--precision", choices=tuple(DTYPES), default="", help="default: fp16 on cuda, else fp32")
    add("--head-width", type=int, default=HEAD_WIDTH, help="of the UNet's attention heads")
    return parser
