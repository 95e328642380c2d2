"""The lists of packages agree with one another."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]

# What ComfyUI ships: a second requirement could only move the host's own version.
COMFYUI_SHIPS = {
    "torch",
    "torchvision",
    "torchaudio",
    "numpy",
    "pillow",
    "scipy",
    "safetensors",
    "transformers",
    "tqdm",
    "psutil",
    "pyyaml",
    "aiohttp",
    "einops",
    "tokenizers",
    "kornia",
    "pydantic",
    "sqlalchemy",
    "alembic",
    "av",
    "requests",
    "filelock",
    "blake3",
    "simpleeval",
    "spandrel",
    "sentencepiece",
    "pyopengl",
    "comfy-kitchen",
    "comfy-aimdo",
    "comfy-angle",
}


def read(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked(**environment: str) -> dict[str, str]:
    """Versions the lock gives on one platform, by canonical name."""
    chosen = {}
    for requirement in read("requirements.lock"):
        if requirement.marker is None or requirement.marker.evaluate(dict(environment)):
            (pin,) = requirement.specifier
            assert pin.operator == "==", requirement
            name = canonicalize_name(requirement.name)
            assert name not in chosen, f"{name} is pinned twice for {environment}"
            chosen[name] = pin.version
    return chosen


LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
WINDOWS = {"sys_platform": "win32", "platform_machine": "AMD64", "platform_system": "Windows"}
MACOS = {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin"}
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def python(version: str) -> dict[str, str]:
    return {"python_version": version, "python_full_version": f"{version}.0"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("platform", [LINUX, WINDOWS, MACOS], ids=["linux", "windows", "macos"])
@pytest.mark.parametrize("name", ["requirements.txt", "trainer/requirements.txt"])
def test_lock_fulfils_the_loose_lists(name: str, platform: dict[str, str], version: str) -> None:
    environment = {**platform, **python(version)}
    pins = locked(**environment)
    for wanted in read(name):
        if wanted.marker is None or wanted.marker.evaluate(environment):
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), wanted


@pytest.mark.parametrize("platform", [WINDOWS, MACOS], ids=["windows", "macos"])
def test_cuda_libraries_are_for_linux_only(platform: dict[str, str]) -> None:
    def cuda(pins: dict[str, str]) -> list[str]:
        return [n for n in pins if re.match(r"nvidia-|cuda-|triton$", n)]

    assert len(cuda(locked(**LINUX, **python("3.11")))) >= 15
    assert cuda(locked(**platform, **python("3.11"))) == []


def test_one_onnxruntime_only() -> None:
    pins = locked(**LINUX, **python("3.11"))
    assert [n for n in pins if n.startswith("onnxruntime")] == ["onnxruntime"]


def test_manager_list_leaves_out_what_comfyui_ships() -> None:
    names = {canonicalize_name(requirement.name) for requirement in read("requirements.txt")}
    assert names & COMFYUI_SHIPS == set()
    assert all(
        spec.operator == ">=" for wanted in read("requirements.txt") for spec in wanted.specifier
    )


def test_pyproject_repeats_the_managers_list() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(project["dependencies"]) == sorted(map(str, read("requirements.txt")))
