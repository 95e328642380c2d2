"""A folder of identities: saving under a name without losing what is there."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from .checkpoint import identity_path, write_identity
from .errors import NameTakenError, OptionError, shown
from .identity import Identity

IfExists = Literal["keep both", "overwrite", "error"]
IF_EXISTS: tuple[IfExists, ...] = get_args(IfExists)


def save_identity(
    identity: Identity, folder: str | Path, name: str, if_exists: IfExists = "keep both"
) -> Path:
    """Write ``<folder>/<name>.safetensors`` atomically and return its path.

    Where the name is taken: ``keep both`` appends a number, ``overwrite`` replaces the file,
    ``error`` raises ``NameTakenError``. Raises ``NameNotAllowedError`` for a name that is none.
    """
    if if_exists not in IF_EXISTS:
        raise OptionError(
            f"if_exists must be one of {', '.join(IF_EXISTS)}; got {shown(if_exists)}."
        )
    path = identity_path(folder, name)
    if path.exists() and if_exists == "error":
        raise NameTakenError(
            path, "there is an identity of this name already. Choose another name, or 'overwrite'."
        )
    if if_exists == "keep both":
        path = _free(path)
    named = replace(identity, config=replace(identity.config, name=path.stem))
    write_identity(path, named)
    return path


def _free(path: Path) -> Path:
    """``path`` itself, or with the first number that is not taken."""
    if not path.exists():
        return path
    numbered = (path.with_name(f"{path.stem} {n}{path.suffix}") for n in itertools.count(2))
    return next(candidate for candidate in numbered if not candidate.exists())
