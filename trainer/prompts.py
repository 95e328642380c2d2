"""Encoded prompts in a file, so that neither previews nor the tiny world need a text encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infinite_id_core.checkpoint import read_header, replacing
from infinite_id_core.errors import ModelMismatchError, WrongFormatError
from infinite_id_core.host_diffusers import Prompt

FORMAT = "infinite-id-prompts"


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptFile:
    """Several positive prompts and one negative."""

    texts: tuple[str, ...]
    negative_text: str
    positive: tuple[Prompt, ...]
    negative: Prompt

    def check(self, context_width: int, pooled_width: int) -> None:
        """Raise ``ModelMismatchError`` where the prompts were encoded for another model."""
        found = self.negative.context.shape[-1], self.negative.pooled.shape[-1]
        if found != (context_width, pooled_width):
            raise ModelMismatchError(
                f"The encoded prompts have context and pooled widths {found}; the UNet reads "
                f"{(context_width, pooled_width)}. Encode them with this model's text encoders."
            )


def write_prompts(path: str | Path, prompts: PromptFile) -> None:
    """Write a prompt file atomically."""
    everything = [*prompts.positive, prompts.negative]
    tensors = {
        "context": torch.cat([p.context for p in everything]).float().cpu(),
        "pooled": torch.cat([p.pooled for p in everything]).float().cpu(),
    }
    texts = [*prompts.texts, prompts.negative_text]
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "texts": json.dumps(texts)})


def read_prompts(path: str | Path) -> PromptFile:
    """Read a prompt file: context ``[n, T, C]``, pooled ``[n, P]``, the last one negative.

    Raises a subclass of ``FileError``.
    """
    header = read_header(path)
    if header.metadata.get("format") != FORMAT or set(header.tensors) != {"context", "pooled"}:
        raise WrongFormatError(
            path, "is no file of encoded prompts. Make one with 'python -m trainer generate "
            "--save-prompts FILE'."
        )  # fmt: skip
    tensors = load_file(path)
    texts: Sequence[str] = json.loads(header.metadata["texts"])
    context, pooled = (torch.split(tensors[name], 1) for name in ("context", "pooled"))
    if not len(texts) == len(context) == len(pooled) >= 2:
        raise WrongFormatError(
            path, f"holds {len(texts)} texts and {len(context)} encodings; expected as many, and "
            "at least a positive and a negative one."
        )  # fmt: skip
    prompts = [Prompt(context=c, pooled=p) for c, p in zip(context, pooled, strict=True)]
    return PromptFile(
        texts=tuple(texts[:-1]),
        negative_text=texts[-1],
        positive=tuple(prompts[:-1]),
        negative=prompts[-1],
    )
