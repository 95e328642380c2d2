"""The two CLIP text encoders and their tokens, without a host.

ComfyUI tokenizes with the CLIP tokenizer it ships; open_clip's tokenizer has the same merges. As
in SDXL, the context is both encoders' penultimate hidden states side by side (no final norm), and
the pooled text is the second encoder's projected end token.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import open_clip
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from microworld.captions import all_phrases
from microworld.config import TEXT_G, TEXT_L

END = 49407


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return open_clip.tokenizer.SimpleTokenizer()


def tokenize(captions: list[str]) -> torch.Tensor:
    """Token ids [B, 77]: start, words, end, zeros (the second encoder's padding)."""
    return _tokenizer()(captions)


@lru_cache(maxsize=1)
def used_ids() -> tuple[int, ...]:
    """The token ids that captions can contain, padding, start and end included; sorted."""
    found = {int(v) for phrase in all_phrases() for v in tokenize([phrase])[0]}
    return tuple(sorted(found))


def row_of_ids() -> torch.Tensor:
    """[49408]: each token id's place in `used_ids`; unused ids share the place after the last."""
    ids = used_ids()
    rows = torch.full((int(TEXT_L["vocab_size"]),), len(ids))
    rows[list(ids)] = torch.arange(len(ids))
    return rows


class TextEncoders(nn.Module):
    """Both encoders; `forward` gives what SDXL's UNet reads.

    While they learn they hold rows for `used_ids` only, and one last row, the mean of the others,
    for every other token: the row that `files.expand_vocabularies` gives unknown words.
    """

    rows: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        ids = used_ids()
        self.register_buffer("rows", row_of_ids(), persistent=False)
        self.end_row = ids.index(END)
        own = {
            "vocab_size": len(ids) + 1,
            "eos_token_id": self.end_row,
            "bos_token_id": 0,
            "pad_token_id": 0,
            "attn_implementation": "eager",
        }
        self.l = CLIPTextModelWithProjection(CLIPTextConfig(**{**TEXT_L, **own}))
        self.g = CLIPTextModelWithProjection(CLIPTextConfig(**{**TEXT_G, **own}))
        for encoder in (self.l, self.g):
            nn.init.normal_(encoder.get_input_embeddings().weight, std=0.1)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, 77] to context [B, 77, L + G] and pooled text [B, G]."""
        for encoder in (self.l, self.g):
            table = encoder.get_input_embeddings().weight
            with torch.no_grad():
                table[-1] = table[:-1].mean(0)
        for_l = tokens.clone()
        past = torch.arange(77) > tokens.argmax(dim=-1, keepdim=True)
        for_l[past] = END  # the first encoder is padded with the end token
        seen_l = self.l(self.rows[for_l], output_hidden_states=True)
        seen_g = self.g(self.rows[tokens], output_hidden_states=True)
        context = torch.cat([seen_l.hidden_states[-2], seen_g.hidden_states[-2]], dim=-1)
        return context, seen_g.text_embeds
