"""Where the pack's files live, in ComfyUI's own registry of model folders.

The default folder and every folder a user's yaml adds are both searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from os.path import isfile  # unlike Path's, False also where a name is longer than any file's
from pathlib import Path, PurePosixPath
from typing import Any

import folder_paths

from ..infinite_id_core.errors import (
    FileMissingError,
    InfiniteIDError,
    NameNotAllowedError,
    shown,
)
from ..infinite_id_core.faces.pack import find_whole_pack
from ..infinite_id_core.marks import mark_of

ADAPTERS = "infinite_id"
PUBLISHED = ("ipadapter", "instantid", "pulid")  # where other packs keep theirs
IDENTITIES = "infinite_id_identities"
INSIGHTFACE = "insightface"
CLIP_VISION = "clip_vision"

_EXTENSIONS = {
    ADAPTERS: {".safetensors"},
    IDENTITIES: {".safetensors"},
    INSIGHTFACE: {".onnx"},
    **{kind: {".safetensors", ".bin"} for kind in PUBLISHED},
}


def register() -> None:
    """Add the pack's folders to ComfyUI's registry; safe to call more than once."""
    for kind, extensions in _EXTENSIONS.items():
        paths, known = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        default = str(Path(folder_paths.models_dir) / kind)
        # A folder that only yaml (or add_model_folder_path) named has an empty extension set,
        # which ComfyUI takes for "every file".
        folder_paths.folder_names_and_paths[kind] = (
            [*paths, *([] if default in paths else [default])],
            set(known) | extensions,
        )


def adapter_files() -> list[str]:
    """Names of the adapter files there are."""
    return _files(ADAPTERS)


def adapter_path(name: str) -> Path:
    """Path of an adapter file. Raises ``FileMissingError`` or ``NameNotAllowedError``."""
    return _find(ADAPTERS, name)


def published_files() -> list[str]:
    """Adapter files of other packs' folders, as ``folder/name``."""
    return [f"{kind}/{name}" for kind in PUBLISHED for name in _files(kind)]


def all_adapter_files() -> list[str]:
    """Every adapter file as ``folder/name``: our own folder's, and those of other packs."""
    return [*(f"{ADAPTERS}/{name}" for name in adapter_files()), *published_files()]


def adapter_path_of(name: str) -> Path:
    """Path of a file as ``adapter_files`` or ``published_files`` names it. Raises as both."""
    known = isinstance(name, str) and name.replace("\\", "/").startswith(
        tuple(f"{kind}/" for kind in PUBLISHED)
    )
    return any_adapter_path(name) if known and not _is_own(name) else adapter_path(name)


def _is_own(name: str) -> bool:
    """Whether our own folder has a file of that name below it."""
    try:
        adapter_path(name)
    except InfiniteIDError:
        return False
    return True


def any_adapter_path(name: str) -> Path:
    """Path of a file as ``all_adapter_files`` names it; what follows `` [`` is for people.

    Raises ``FileMissingError`` or ``NameNotAllowedError``.
    """
    kind, _, rest = str(name).partition(" [")[0].replace("\\", "/").partition("/")
    if kind not in (ADAPTERS, *PUBLISHED):
        raise NameNotAllowedError(
            f"Expected an adapter as folder/file, of {', '.join((ADAPTERS, *PUBLISHED))}; got "
            f"{shown(name)}."
        )
    return _find(kind, rest)


def identity_files() -> list[str]:
    """Names of the identity files there are."""
    return _files(IDENTITIES)


def identity_path(name: str) -> Path:
    """Path of an identity file. Raises ``FileMissingError`` or ``NameNotAllowedError``."""
    return _find(IDENTITIES, name)


def identity_folder() -> Path:
    """Where new identities are written: the first folder of their kind."""
    register()
    return Path(folder_paths.get_folder_paths(IDENTITIES)[0])


def clip_vision_files() -> list[str]:
    """Names of the safetensors files in the clip_vision folders."""
    return [n for n in _files(CLIP_VISION) if n.endswith(".safetensors")]


def encoder_files() -> list[str]:
    """Names of all model files in the clip_vision folders, pickles too: of PuLID's encoder its
    authors publish nothing else."""
    return _files(CLIP_VISION)


def clip_vision_path(name: str) -> Path:
    """Path of an image encoder's file. Raises ``FileMissingError`` or ``NameNotAllowedError``."""
    return _find(CLIP_VISION, name)


def insightface_roots() -> list[Path]:
    """Folders that hold ``models/<pack>/*.onnx``."""
    register()
    paths = [Path(p) for p in folder_paths.get_folder_paths(INSIGHTFACE)]
    # A yaml line may name the `models` folder itself.
    roots = [p.parent if p.name == "models" else p for p in paths]
    return list(dict.fromkeys(roots))


def face_pack_path(name: str) -> Path:
    """Folder of a face model pack. Raises ``FaceModelError`` or ``NameNotAllowedError``."""
    return find_whole_pack(name, insightface_roots())


def face_packs() -> list[str]:
    """Names of the face model packs in any of the insightface folders."""
    found = (
        pack.name
        for root in insightface_roots()
        if (root / "models").is_dir()
        for pack in (root / "models").iterdir()
        if pack.is_dir() and not pack.name.startswith(".") and any(pack.rglob("*.onnx"))
    )
    return sorted(set(found))


def check(name: Any, find: Callable[[Any], Path]) -> bool | str:
    """For ``validate_inputs``: True where ``find`` finds it, else what is wrong, in words.

    The host asks every node before anything runs, so that all missing files are named at once. It
    gives None for a name that a link will bring.
    """
    try:
        if name is not None:
            find(name)
    except InfiniteIDError as error:
        return str(error)
    return True


def mark(name: Any, find: Callable[[Any], Path]) -> str | float:
    """For ``fingerprint_inputs``: another value when the file, or folder of files, was replaced.

    NaN, which equals nothing, for a name that a link will bring. Never raises: of a file that is
    not there the node itself says so.
    """
    if name is None:
        return math.nan
    try:
        return mark_of(find(name))
    except InfiniteIDError as error:
        return str(error)


def _files(kind: str) -> list[str]:
    """Names of a kind's files. ComfyUI may still list what was removed a moment ago."""
    register()
    names = folder_paths.get_filename_list(kind)
    return [name for name in names if folder_paths.get_full_path(kind, name)]


def _find(kind: str, name: str) -> Path:
    """A file of this kind by its name as ComfyUI lists it; subfolders of the folder are fine."""
    register()
    parts = PurePosixPath(name.replace("\\", "/")).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or ":" in name or name.startswith(("/", "\\", "~")):
        raise NameNotAllowedError(
            f"Expected the name of a file in the folder {kind}, got {shown(name)}. Choose one "
            "from the list; paths that leave the folder are not followed."
        )
    folders = [Path(p) for p in folder_paths.get_folder_paths(kind)]
    for folder in folders:
        if isfile(folder.joinpath(*parts)):
            return folder.joinpath(*parts)
    searched = "; ".join(str(folder) for folder in folders)
    raise FileMissingError(
        name, f"no such file. Searched: {searched}. Put it there, or choose another."
    )
