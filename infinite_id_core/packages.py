"""Optional packages: imported where they are needed, missed by name only there."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from types import ModuleType

from .errors import MissingPackageError

_ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-silicon",
)


def require(module: str, purpose: str, install: str) -> ModuleType:
    """Import ``module``, or raise ``MissingPackageError`` saying how to install it.

    ``purpose`` completes "is needed ..."; ``install`` is what pip is given.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        absent = importlib.util.find_spec(missing) is None
        problem = "is not installed" if absent else f"cannot be imported ({error})"
        raise MissingPackageError(
            f"The Python package {missing!r} is needed {purpose} and {problem}. Install it into "
            f"the Python that runs this: {sys.executable} -m pip install {install}",
            name=missing,
        ) from error


def onnxruntime_conflict() -> str | None:
    """A warning if several builds of onnxruntime are installed: they overwrite each other."""
    found = []
    for name in _ONNXRUNTIMES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(found) < 2:
        return None
    names = " ".join(entry.split()[0] for entry in found)
    return (
        f"{' and '.join(found)} are installed side by side and break each other. Keep one: "
        f"{sys.executable} -m pip uninstall -y {names}, then install the one you want "
        "(onnxruntime-gpu for CUDA, onnxruntime otherwise)."
    )
