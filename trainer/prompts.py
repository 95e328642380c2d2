"""Encoded prompts in a file, so that neither previews nor the tiny world need a text encoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from infinite_id_core.errors import ModelMismatchError, WrongFormatError, WrongShapeError
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.safetensors_file import json_object, open_safetensors, save_tensors
from infinite_id_core.files.system import writing
from infinite_id_core.hosts.diffusers_sample import Prompt

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
    """Write a prompt file atomically. Raises ``DiskFullError``, ``NotWrittenError``."""
    everything = [*prompts.positive, prompts.negative]
    tensors = {
        "context": torch.cat([p.context for p in everything]).float().cpu(),
        "pooled": torch.cat([p.pooled for p in everything]).float().cpu(),
    }
    texts = [*prompts.texts, prompts.negative_text]
    with writing(path), replacing(path) as temporary:
        save_tensors(tensors, temporary, {"format": FORMAT, "texts": json.dumps(texts)})


def read_prompts(path: str | Path) -> PromptFile:
    """Read a prompt file: context ``[n, T, C]``, pooled ``[n, P]``, the last one negative.

    Raises a subclass of ``FileError``.
    """
    with open_safetensors(path) as file:
        header = file.header
        if header.metadata.get("format") != FORMAT or set(header.tensors) != {"context", "pooled"}:
            raise WrongFormatError(
                path, "is no file of encoded prompts. Make one with 'python -m trainer generate "
                "--save-prompts FILE'."
            )  # fmt: skip
        shapes = [header.tensors[name].shape for name in ("context", "pooled")]
        if [len(shape) for shape in shapes] != [3, 2] or any(0 in shape for shape in shapes):
            raise WrongShapeError(
                path, f"context and pooled have shapes {shapes}; expected [n, tokens, width] and "
                "[n, width]."
            )  # fmt: skip
        texts = _texts(path, header.metadata.get("texts", ""))
        if not len(texts) == shapes[0][0] == shapes[1][0] >= 2:
            raise WrongFormatError(
                path, f"holds {len(texts)} texts and {shapes[0][0]} encodings; expected as many, "
                "and at least a positive and a negative one."
            )  # fmt: skip
        context, pooled = (
            torch.split(file.tensor(name, torch.float32), 1) for name in ("context", "pooled")
        )
    prompts = [Prompt(context=c, pooled=p) for c, p in zip(context, pooled, strict=True)]
    return PromptFile(
        texts=tuple(texts[:-1]),
        negative_text=texts[-1],
        positive=tuple(prompts[:-1]),
        negative=prompts[-1],
    )


def _texts(path: str | Path, text: str) -> list[str]:
    try:
        texts = json_object(text)
    except ValueError as error:
        raise WrongFormatError(path, f"its texts are not JSON ({error}).") from error
    if not isinstance(texts, list) or not all(isinstance(entry, str) for entry in texts):
        raise WrongFormatError(path, "its texts must be a list of texts.")
    return texts
