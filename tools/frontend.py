"""A release of ComfyUI's page that no environment has: installed into the user's cache folder.

    INFINITE_ID_FRONTEND=newest python run.py test tests/server/test_page.py

The newest release, or a version such as 1.58.1, is served by ComfyUI's --front-end-root.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from run import cache_folder

PACKAGE = "comfyui-frontend-package"
VARIABLE = "INFINITE_ID_FRONTEND"
NEWEST = "newest"


class FrontendError(Exception):
    """A release of the page cannot be had; the message says which and why."""


@functools.cache
def shown() -> tuple[str, tuple[str, ...]]:
    """The version that ComfyUI is to show, and its arguments for that.

    Raises:
        FrontendError: another than its own is wanted, and cannot be had.
    """
    version = wanted()
    if version is None:
        return importlib.metadata.version(PACKAGE), ()  # the one it pins
    return version, ("--front-end-root", str(folder(version)))


def wanted() -> str | None:
    """The version that INFINITE_ID_FRONTEND names, 'newest' looked up; None: the host's own.

    Raises:
        FrontendError: the newest is wanted, and the registry does not answer.
    """
    named = os.environ.get(VARIABLE)
    return newest() if named == NEWEST else named or None


def newest() -> str:
    """The newest release in the package registry. Raises ``FrontendError``."""
    said = _pip("--dry-run", "--ignore-installed", "--quiet", "--report", "-", PACKAGE)
    return str(json.loads(said)["install"][0]["metadata"]["version"])


def folder(version: str) -> Path:
    """The folder of that release's page, installed where it is not there yet.

    Raises:
        FrontendError: there is no such release, or no network.
    """
    place = cache_folder() / f"frontend-{version}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix="frontend-") as made:
            fresh = Path(made) / "frontend"
            _pip("--quiet", "--target", str(fresh), f"{PACKAGE}=={version}")
            try:
                fresh.rename(place)
            except OSError:
                if not place.is_dir():  # else another run of ours was first
                    raise
    return place / PACKAGE.replace("-", "_") / "static"


def _pip(*arguments: str) -> str:
    """What ``pip install`` prints on standard output."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode != 0:
        raise FrontendError(f"pip could not get {arguments[-1]}:\n{done.stderr.strip()}")
    return done.stdout
