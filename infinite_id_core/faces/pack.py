"""Face model packs: a detector and a recogniser, as insightface's ``FaceAnalysis``."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from os.path import isfile  # unlike Path's, False also where a name is longer than any file's
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import FaceModelError, NameNotAllowedError, OptionError, shown
from ..packages import onnxruntime_conflict, require

Provider = Literal["auto", "CPU", "CUDA", "ROCm", "CoreML", "DirectML"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

DETECTOR_SIZE = 640
_LONGEST_NAME = 255  # bytes: file systems take no more
_MANIFEST = "manifest.json"  # a pack that says itself what it holds, and where
_SMALLEST_PACK = 2  # files: a detector and a recogniser

_PROVIDER_NAMES: dict[str, tuple[str, ...]] = {
    "CUDA": ("CUDAExecutionProvider",),
    "ROCm": ("ROCMExecutionProvider", "MIGraphXExecutionProvider"),
    "DirectML": ("DmlExecutionProvider",),
    "CoreML": ("CoreMLExecutionProvider",),
    "CPU": ("CPUExecutionProvider",),
}
_FOR_FACES = "to find faces"
_INSTALL_FACES = "insightface onnxruntime"

logger = logging.getLogger(__name__)


def load_face_models(
    pack: str,
    roots: Sequence[Path],
    provider: Provider = "auto",
    detector_size: int = DETECTOR_SIZE,
    threads: int = 0,
) -> Any:
    """insightface's ``FaceAnalysis`` on ``<root>/models/<pack>/*.onnx`` of the first root with it.

    The object is the one the InstantID and PuLID packs pass around; theirs work here as well.
    Nothing is downloaded. ``threads``: of each model on the CPU; 0 leaves it to onnxruntime.

    Raises ``FaceModelError`` (missing, nested, damaged or incomplete pack, provider that is not
    there), ``MissingPackageError``, ``NameNotAllowedError``, ``OptionError``.
    """
    if detector_size % 32 or not 64 <= detector_size <= 4096:
        raise OptionError(
            f"detector_size must be a multiple of 32 in [64, 4096], got {shown(detector_size)}. "
            f"{DETECTOR_SIZE} is usual."
        )
    folder = find_pack(pack, roots)
    runtime = _onnxruntime()
    providers = choose_providers(provider, runtime.get_available_providers())
    app = _loaded(folder, providers, _sessions(runtime, threads))
    _check_provider(app, provider, providers)
    app.prepare(ctx_id=0, det_size=(detector_size, detector_size))
    return app


def _onnxruntime() -> Any:
    runtime = require("onnxruntime", _FOR_FACES, _INSTALL_FACES)
    conflict = onnxruntime_conflict()
    if conflict:
        logger.warning("Infinite-ID: %s", conflict)
    return runtime


def _sessions(runtime: Any, threads: int) -> dict[str, Any]:
    """How insightface is to make its sessions."""
    if not threads:
        return {}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    return {"sess_options": options}


def _loaded(folder: Path, providers: Sequence[str], sessions: Mapping[str, Any]) -> Any:
    """A whole pack. Raises ``FaceModelError``, ``MissingPackageError``."""
    analysis = require("insightface.app", _FOR_FACES, _INSTALL_FACES).FaceAnalysis
    try:
        # An absolute folder in place of a name is never looked up for download.
        app = analysis(
            name=str(folder.resolve()), root=str(folder), providers=list(providers), **sessions
        )
    except AssertionError as error:  # insightface's only word on a pack without a detector
        raise FaceModelError(_incomplete(folder, "detector", "")) from error
    except Exception as error:
        raise FaceModelError(
            f"{folder}: the face models cannot be loaded ({error}). If a file is damaged, download "
            f"the pack again; it holds {_onnx_names(folder)}."
        ) from error
    if "recognition" not in app.models:
        raise FaceModelError(_incomplete(folder, "recogniser", ", ".join(sorted(app.models))))
    return app


def find_pack(pack: str, roots: Sequence[Path]) -> Path:
    """Folder of a face model pack. Raises ``FaceModelError`` listing every folder searched."""
    if not _is_plain_name(pack):
        raise NameNotAllowedError(
            f"Expected the plain name of a face model pack, got {shown(pack)}. Choose one from the "
            "list."
        )
    searched = [root / "models" / pack for root in roots]
    for folder in searched:
        if _found(folder, "*.onnx") or isfile(folder / _MANIFEST):
            return folder
    _check_misplaced(pack, searched)
    listed = "\n".join(f"  {folder}" for folder in searched) or "  (no folder at all)"
    raise FaceModelError(
        f"The face model pack {pack!r} was not found. Nothing is downloaded: put its .onnx files "
        f"(detector and recogniser) into one of the folders searched:\n{listed}"
    )


def _check_misplaced(pack: str, searched: Sequence[Path]) -> None:
    """Raise ``FaceModelError`` for a pack that is there, but nested or zipped."""
    for folder in searched:
        nested = sorted({path.parent for path in _found(folder, "**/*.onnx")})
        if nested:
            raise FaceModelError(
                f"The face models of {pack!r} lie one folder too deep, in {nested[0]}. Move its "
                f".onnx files up into {folder}."
            )
        if isfile(folder.with_name(f"{pack}.zip")):
            raise FaceModelError(f"{folder}.zip is not unpacked. Unpack it into {folder}.")


def find_whole_pack(pack: str, roots: Sequence[Path]) -> Path:
    """As ``find_pack``; refuses also a pack of too few files to be whole, without loading any."""
    folder = find_pack(pack, roots)
    if not isfile(folder / _MANIFEST) and len(_found(folder, "*.onnx")) < _SMALLEST_PACK:
        raise FaceModelError(_incomplete(folder, "detector or no recogniser", ""))
    return folder


def _is_plain_name(name: object) -> bool:
    """Whether ``name`` can be a folder's, and of no other place than where it is looked for."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and Path(name).name == name
        and not any(c in "/\\" or unicodedata.category(c) in ("Cc", "Cs") for c in name)
        and len(name.encode("utf-8")) <= _LONGEST_NAME
    )


def _found(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by a pattern; none where the folder cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def choose_providers(provider: Provider, available: Sequence[str]) -> list[str]:
    """onnxruntime's names for a choice, the CPU last. Raises ``FaceModelError``."""
    if provider not in PROVIDERS:
        raise OptionError(f"provider must be one of {', '.join(PROVIDERS)}; got {shown(provider)}.")
    wanted = list(_PROVIDER_NAMES) if provider == "auto" else [provider]
    found = [name for kind in wanted for name in _PROVIDER_NAMES[kind] if name in available]
    if not found:
        kinds = [k for k, names in _PROVIDER_NAMES.items() if any(n in available for n in names)]
        raise FaceModelError(
            f"onnxruntime has no provider for {provider}; this build has "
            f"{', '.join(kinds) or 'none of ours'} ({', '.join(available)}). Choose one of these "
            "or 'auto', or install the onnxruntime build for your device."
        )
    return list(dict.fromkeys([found[0], "CPUExecutionProvider"]))


def recogniser_name(app: Any) -> str:
    """``<pack>/<model>`` of any insightface ``FaceAnalysis``, e.g. ``buffalo_l/w600k_r50``.

    Raises ``FaceModelError`` where it has no recogniser.
    """
    model = recogniser_of(app)
    file = Path(str(getattr(model, "model_file", None) or "recogniser.onnx"))
    pack = file.parent.name or Path(str(getattr(app, "model_dir", "") or "unknown")).name
    return f"{pack}/{file.stem}"


def recogniser_of(app: Any) -> Any:
    """The recogniser of any insightface ``FaceAnalysis``. Raises ``FaceModelError``."""
    models = getattr(app, "models", None)
    models = models if isinstance(models, Mapping) else {}
    if "recognition" not in models:
        raise FaceModelError(
            "The connected face models have no recogniser, so nobody can be told apart. They hold "
            f"{', '.join(sorted(models)) or 'nothing'}. Load a whole pack such as buffalo_l."
        )
    return models["recognition"]


def check_detector(app: Any) -> None:
    """Raise ``FaceModelError`` for what has no detector, or is no face models at all."""
    if getattr(getattr(app, "det_model", None), "detect", None) is None:
        raise FaceModelError(
            f"Expected face models with a detector, got {shown(app)}. Connect Infinite-ID Load "
            "Face Models, or the loader of the InstantID or PuLID pack."
        )


def _check_provider(app: Any, provider: str, providers: Sequence[str]) -> None:
    """onnxruntime falls back to the CPU without a word where a provider's libraries are absent."""
    session = getattr(app.models["recognition"], "session", None)
    active = session.get_providers() if session is not None else providers
    if providers[0] in active:
        return
    message = (
        f"onnxruntime offers {providers[0]} but cannot start it (runs on {', '.join(active)}). "
        "Its libraries do not match this machine: install the matching onnxruntime build"
    )
    if provider != "auto":
        raise FaceModelError(f"{message}, or choose 'auto' or 'CPU'.")
    logger.warning("Infinite-ID: %s.", message)


def _incomplete(folder: Path, part: str, found: str) -> str:
    return (
        f"{folder} has no {part}{f' (only {found})' if found else ''}. A pack needs a detector and "
        f"a recogniser; this one holds {_onnx_names(folder)}. Copy the whole pack."
    )


def _onnx_names(folder: Path) -> str:
    return ", ".join(path.name for path in _found(folder, "*.onnx")) or "no .onnx file"
