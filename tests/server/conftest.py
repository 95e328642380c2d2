"""A live ComfyUI with the pack installed, one for all server tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.comfy_live import ComfyServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    """A running server in a temporary base directory: `server.base / "models"` and so on."""
    with ComfyServer(host=Path(os.environ["COMFYUI_PATH"]), pack=ROOT, cpu=True) as running:
        yield running
