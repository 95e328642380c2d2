"""A live ComfyUI with the pack installed, one for all server tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import frontend
from tools.comfy_live import ComfyServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    """A running server in a temporary base directory: `server.base / "models"` and so on."""
    host = Path(os.environ["COMFYUI_PATH"])
    _, page = frontend.shown()
    with ComfyServer(host=host, pack=ROOT, cpu=True, extra_args=page) as running:
        yield running
