"""The environment that runs this holds what the host's own list asks for."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LIST = Path(os.environ["COMFYUI_PATH"]) / "requirements.txt"
WANTED = [
    line.strip()
    for line in LIST.read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize("line", WANTED)
def test_a_requirement_of_the_host_is_installed(line: str) -> None:
    """In .venv it comes from requirements.lock, so the lock fits the release that run.py names."""
    wanted = Requirement(line)
    assert wanted.specifier.contains(importlib.metadata.version(wanted.name)), line
