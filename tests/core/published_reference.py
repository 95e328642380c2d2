"""Plain references of the published projectors, written from descriptions of their networks.

They take a file's own tensors, and share nothing with the code under test.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, leaky_relu, linear

State = dict[str, Tensor]


def fc(state: State, name: str, x: Tensor) -> Tensor:
    return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return layer_norm(x, (len(weight),), weight, state[f"{name}.bias"], eps=1e-5)


def attend(state: State, name: str, x: Tensor, latents: Tensor) -> Tensor:
    """One head after another; ``x [S, d]``, ``latents [L, d]``."""
    x, latents = norm(state, f"{name}.norm1", x), norm(state, f"{name}.norm2", latents)
    both = torch.cat([x, latents])
    q, kv = fc(state, f"{name}.to_q", latents), fc(state, f"{name}.to_kv", both)
    inner = q.shape[1]
    k, v = kv[:, :inner], kv[:, inner:]
    heads = []
    for start in range(0, inner, 64):
        part = slice(start, start + 64)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(64)).softmax(dim=-1)
        heads.append(weights @ v[:, part])
    return fc(state, f"{name}.to_out", torch.cat(heads, dim=1))


def block(state: State, name: str, x: Tensor, latents: Tensor) -> Tensor:
    latents = latents + attend(state, f"{name}.0", x, latents)
    hidden = gelu(fc(state, f"{name}.1.1", norm(state, f"{name}.1.0", latents)))
    return latents + fc(state, f"{name}.1.3", hidden)


def resampler(state: State, x: Tensor) -> Tensor:
    """``x [S, inputs]`` -> ``[M, C]``."""
    x, latents = fc(state, "proj_in", x), state["latents"][0]
    for i in range(4):
        latents = block(state, f"layers.{i}", x, latents)
    return norm(state, "norm_out", fc(state, "proj_out", latents))


def face_tokens(state: State, face: Tensor) -> Tensor:
    """``face [512]`` -> ``[T, C]``."""
    x = fc(state, "proj.2", gelu(fc(state, "proj.0", face)))
    return norm(state, "norm", x.view(-1, len(state["norm.weight"])))


def stack(state: State, name: str, x: Tensor) -> Tensor:
    for i in (0, 3):
        x = leaky_relu(norm(state, f"{name}.{i + 1}", fc(state, f"{name}.{i}", x)), 0.01)
    return fc(state, f"{name}.6", x)


def pulid_v1(state: State, face: Tensor, eva: Tensor, levels: Tensor) -> Tensor:
    """``[512]``, ``[768]``, ``[5, 577, W]`` -> ``[10, C]``."""
    rows = [stack(state, "body", torch.cat([face, eva])).view(5, -1)]
    for i, level in enumerate(levels):
        patches = stack(state, f"mapping_patch_{i}", level[1:]).mean(dim=0)
        rows.append((stack(state, f"mapping_{i}", level[0]) + patches)[None])
    return torch.cat(rows)


def pulid_v11(state: State, faces: Tensor, evas: Tensor, levels: Tensor) -> Tensor:
    """Photos ``[n, 512]``, ``[n, 768]``, ``[n, 5, 577, W]`` -> ``[M, C]``."""
    d = state["latents"].shape[2]
    ids = torch.cat(
        [stack(state, "id_embedding_mapping", torch.cat([f, e])).view(-1, d)
         for f, e in zip(faces, evas, strict=True)]
    )  # fmt: skip
    latents = torch.cat([state["latents"][0], ids])
    for i in range(5):
        read = torch.cat([stack(state, f"mapping_{i}", photo[i]) for photo in levels])
        for number in (2 * i, 2 * i + 1):
            latents = block(state, f"layers.{number}", torch.cat([ids, read]), latents)
    return latents[: state["latents"].shape[1]] @ state["proj_out"]
