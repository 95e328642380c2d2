"""Real ComfyUI inside the test process, on the CPU, with a base directory of its own."""

from __future__ import annotations

import asyncio
import atexit
import importlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tools.comfy_live import PACK_FOLDER, copy_pack

ROOT = Path(__file__).resolve().parents[2]
DYNAMIC_VRAM = "INFINITE_ID_DYNAMIC_VRAM"  # environment: 1 runs all tests here in that state


def _enter_host(host: Path) -> Path:
    """Make ComfyUI importable as its main.py does; returns the base directory it was given.

    ComfyUI reads its command line at import, so the arguments must be in place before any of its
    modules is touched. The base directory keeps tests out of the user's models and outputs.
    """
    base = Path(tempfile.mkdtemp(prefix="infinite-id-host-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir()
    if str(host) in sys.path:
        sys.path.remove(str(host))
    sys.path.insert(0, str(host))  # first: `nodes`, `utils` and `server` must be ComfyUI's
    argv = sys.argv
    sys.argv = [str(host / "main.py"), "--cpu", "--base-directory", str(base)]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
        importlib.import_module("folder_paths")
        # Before nodes.py puts the folder comfy, with its utils.py, on sys.path.
        importlib.import_module("utils.extra_config")
        if os.environ.get(DYNAMIC_VRAM) == "1":
            _turn_on_dynamic_vram()
    finally:
        sys.argv = argv
    return base


def _turn_on_dynamic_vram() -> None:
    """The state of the host on an NVIDIA card, as its main.py sets it, before anything is built.

    Layers are then made without weights and filled when a file is loaded. The patchers that move
    the weights need a card; the host itself takes plain ones for the CPU.
    """
    try:
        memory = importlib.import_module("comfy.memory_management")
        patchers = importlib.import_module("comfy.model_patcher")
        dynamic = patchers.ModelPatcherDynamic
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(
            f"{DYNAMIC_VRAM}=1, and this ComfyUI has no dynamic VRAM ({error}). Set COMFYUI_PATH "
            f"to a newer one, or unset {DYNAMIC_VRAM}."
        ) from error
    patchers.CoreModelPatcher = dynamic
    memory.aimdo_enabled = True


# Where there is no host, tests/conftest.py has replaced every test here by a skip.
_HOST = os.environ.get("COMFYUI_PATH")
_BASE = _enter_host(Path(_HOST)) if _HOST else None

# About what the oldest hosts do not have.
_SINCE = {
    "test_multigpu.py": "comfy_extras/nodes_multigpu.py",
    "test_face_pose_multigpu.py": "comfy_extras/nodes_multigpu.py",
    "test_dynamic_vram.py": "comfy/memory_management.py",
}
collect_ignore = [n for n, since in _SINCE.items() if _HOST and not Path(_HOST, since).is_file()]


@pytest.fixture(scope="session")
def comfy_base() -> Path:
    """The base directory of the in-process host: models/, input/, output/, custom_nodes/."""
    assert _BASE is not None
    return _BASE


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="session")
def pack(comfy_base: Path) -> Iterator[ModuleType]:
    """This repository, loaded by ComfyUI's own loader from a folder in custom_nodes.

    Submodules are attributes (`pack.infinite_id_core.method.attention`), and the nodes stand in
    ComfyUI's `nodes.NODE_CLASS_MAPPINGS`. Import the core through `pack` here, never by its
    top-level name: the two would be different modules with different classes.
    """
    folder = copy_pack(ROOT, comfy_base / "custom_nodes" / PACK_FOLDER)
    host_nodes = importlib.import_module("nodes")
    kept = _Kept()
    logging.getLogger().addHandler(kept)
    try:
        loaded = asyncio.run(host_nodes.load_custom_node(str(folder)))
    finally:
        logging.getLogger().removeHandler(kept)
    if not loaded:
        pytest.fail("ComfyUI did not load the pack:\n" + "\n".join(kept.lines))
    name = str(folder).replace(".", "_x_")
    importlib.import_module(f"{name}.infinite_id_core.hosts.comfyui")  # nodes import it late
    yield sys.modules[name]


@pytest.fixture(scope="module")
def host(pack: Any) -> Any:
    return pack.infinite_id_core.hosts.comfyui


@pytest.fixture(scope="module")
def errors(pack: Any) -> Any:
    return pack.infinite_id_core.errors


@pytest.fixture(scope="module")
def model() -> Any:
    from .tiny_sdxl import tiny_model  # not before ComfyUI's arguments are in place

    return tiny_model()


@pytest.fixture(scope="module")
def adapter(pack: Any, model: Any) -> Any:
    from .tiny_sdxl import tiny_adapter

    return tiny_adapter(pack, model)


@pytest.fixture(scope="module")
def identity(pack: Any) -> Any:
    from .tiny_sdxl import tiny_identity

    return tiny_identity(pack)


@pytest.fixture(scope="module")
def patched(host: Any, model: Any, adapter: Any, identity: Any) -> Any:
    return host.apply_identity(model, adapter, identity)


@pytest.fixture(scope="module")
def silent(pack: Any, host: Any, model: Any, identity: Any) -> Any:
    """Applies a patch whose every term is zero: a run of it must equal the unpatched run."""
    from .tiny_sdxl import tiny_adapter

    adapter = tiny_adapter(pack, model)
    for path in adapter.adapter.widths:
        adapter.adapter.key_value(path).to_v.weight.zero_()
    options = pack.infinite_id_core.method.attention.StreamOptions

    def apply(model: Any, text_stream: str = "own", **kwargs: Any) -> Any:
        return host.apply_identity(
            model,
            adapter,
            identity,
            options=options(mixing="off", style="off", text_stream=text_stream),
            **kwargs,
        )

    return apply
