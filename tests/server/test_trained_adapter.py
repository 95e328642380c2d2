"""The README's three commands, made small: from nothing to a picture with an adapter of one's own.

Their defaults are the documented ones; only places, people and steps are fewer here.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infinite_id_core.files.adapters import read_adapter
from tools.comfy_live import ComfyServer
from tools.make_workflows import FOLDER
from tools.workflow_parts import REFERENCE

ROOT = Path(__file__).resolve().parents[2]
FACE_MODELS = "microworld/weights/insightface/models/microworld"
CONFIG = "trainer/configs/tiny.toml"
NAME = "trained_by_a_test.safetensors"
STEPS = 12


def command(*words: object) -> str:
    """Run ``python -m ...`` at the repository's root; what it prints."""
    run = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        # Threads that spin while they wait take minutes where other programs want the cores too.
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People, their dataset and an adapter: ``people``, ``data``, ``adapter``."""
    root = tmp_path_factory.mktemp("tiny")
    command("microworld", "people", root / "people", "--people", 8, "--photos", 3)
    command("trainer", "prepare", root / "people", root / "data", "--face-models", FACE_MODELS)
    settings = {
        "run.output": root / "adapter",
        "run.steps": STEPS,
        "data.folder": root / "data",
        "previews.every": 0,  # nobody of so few people may be held out
    }
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    printed = command("trainer", "train", "--config", CONFIG, *changes)
    assert printed.strip() == str(root / "adapter" / "adapter.safetensors")
    return root


@pytest.fixture(scope="module")
def ready(server: ComfyServer, world: Path) -> ComfyServer:
    """The adapter where ComfyUI's users put it, and a synthetic person as the reference."""
    folder = server.base / "models" / "infinite_id"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_bytes((world / "adapter" / "adapter.safetensors").read_bytes())
    photo = sorted((world / "people").glob("*/0.png"))[0]
    server.upload(photo.read_bytes(), REFERENCE)
    server.refresh()
    return server


def picture(server: ComfyServer, strength: float) -> np.ndarray:
    """Workflow one_face with the trained adapter: its picture ``[H, W, 3]``."""
    graph = json.loads((FOLDER / "one_face.micro.json").read_text(encoding="utf-8"))
    prompt = server.to_api(graph)
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    nodes["InfiniteIDAdapterLoader"]["file"] = NAME
    nodes["InfiniteIDApply"]["strength"] = strength
    nodes["KSampler"]["steps"] = 4
    made = server.run(prompt, timeout=300).images()
    assert len(made) == 1
    return np.asarray(Image.open(io.BytesIO(server.fetch(made[0]))).convert("RGB")).astype(int)


def test_the_file_says_what_it_was_trained_on(world: Path) -> None:
    config = read_adapter(world / "adapter" / "adapter.safetensors").config
    assert config.training_step == STEPS
    assert config.recogniser.startswith("microworld/") and config.clip_model == "microworld"
    assert config.dataset_fingerprint and config.licence_note.startswith("synthetic people")


def test_the_loader_offers_it(ready: ComfyServer) -> None:
    assert NAME in json.dumps(ready.object_info()["InfiniteIDAdapterLoader"]["input"])


def test_it_paints_a_picture_that_its_strength_changes(ready: ComfyServer) -> None:
    painted, plain = picture(ready, 1.0), picture(ready, 0.0)
    assert painted.shape == (128, 128, 3) and painted.std() > 5
    assert np.abs(painted - plain).mean() > 1
