"""A release of ComfyUI's page: looked up and installed once, whole or not at all."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from tools import frontend


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, which is all that pip knows; and an empty cache folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(frontend, "cache_folder", lambda: tmp_path / "cache")
    return wheels


def add_release(registry: Path, version: str) -> None:
    name = f"comfyui_frontend_package-{version}"
    about = f"Metadata-Version: 2.1\nName: {frontend.PACKAGE}\nVersion: {version}\n"
    with zipfile.ZipFile(registry / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("comfyui_frontend_package/static/index.html", version)
        wheel.writestr(f"{name}.dist-info/METADATA", about)
        wheel.writestr(
            f"{name}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def test_the_newest_release_is_installed_once(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_release(registry, "1.9.0")
    add_release(registry, "1.58.1")
    add_release(registry, "2.0.0rc1")
    monkeypatch.setenv(frontend.VARIABLE, frontend.NEWEST)
    version = frontend.wanted()
    assert version == "1.58.1"
    page = frontend.folder(version)
    assert (page / "index.html").read_text(encoding="utf-8") == version
    for wheel in registry.iterdir():
        wheel.unlink()
    assert frontend.folder(version) == page


def test_a_version_or_nothing_needs_no_registry(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(frontend.VARIABLE, "1.40.2")
    assert frontend.wanted() == "1.40.2"
    monkeypatch.delenv(frontend.VARIABLE)
    assert frontend.wanted() is None


def test_what_cannot_be_had_is_named_and_leaves_nothing(registry: Path) -> None:
    with pytest.raises(frontend.FrontendError, match=frontend.PACKAGE):
        frontend.newest()
    with pytest.raises(frontend.FrontendError, match=f"{frontend.PACKAGE}==1.58.1"):
        frontend.folder("1.58.1")
    assert list((registry.parent / "cache").iterdir()) == []
