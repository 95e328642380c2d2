"""A prepared dataset and a micro SDXL for the tests of training; nothing is detected or learned."""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import math
import multiprocessing
import os
import runpy
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from infinite_id_core.files.safetensors_file import read_header
from trainer.config import TrainConfig
from trainer.config_file import parse_config
from trainer.index_file import INDEX, DatasetInfo, table_of, write_index
from trainer.models.unet_names import Layout
from trainer.shards import SHARDS, ShardWriter

from .ldm_names import ldm_names

CONTEXT, POOLED = 16, 8
LAYOUT = Layout(down=((0,), (1,)), middle=1, up=((1, 1), (0, 0)))
LAYERS = 1 + 1 + 2
SIZES = ((96, 64), (64, 96), (80, 80))  # width, height: three aspects


def unet_options() -> dict[str, Any]:
    """diffusers' configuration of the micro UNet: two levels of 32 channels, 64-wide inside."""
    return LAYOUT.config(
        in_channels=4,
        out_channels=4,
        widths=[32, 64],
        head_width=32,
        context_width=CONTEXT,
        added_width=POOLED + 6 * 256,
        linear=True,
    )


def micro_unet(seed: int = 0) -> Any:
    """The micro UNet with random weights everywhere."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**unet_options())
    fill(unet, seed)
    return unet.eval().requires_grad_(False)


def fill(module: torch.nn.Module, seed: int, gain: float = 0.6) -> None:
    """Random weights of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(float(name.endswith("weight")) + 0.05 * noise)
            else:
                parameter.copy_(gain / math.sqrt(parameter[0].numel()) * noise)


def write_unet(path: Path, prefix: str = "model.diffusion_model.", **marks: torch.Tensor) -> Path:
    """The micro UNet as a checkpoint in ComfyUI's naming."""
    unet = micro_unet()
    state = unet.state_dict()
    tensors = {prefix + ldm: state[name].contiguous() for ldm, name in ldm_names(unet).items()}
    save_file({**tensors, **marks}, path)
    return path


def write_dataset(folder: Path, people: int = 6, photos: int = 3, held_out: int = 1) -> Path:
    """A finished dataset: one shard, ``people`` of ``photos`` photos, the last ones held out."""
    rng = np.random.default_rng(0)
    (folder / SHARDS).mkdir(parents=True)
    rows = []
    with (folder / SHARDS / "00000.tar").open("wb") as file:
        writer = ShardWriter(file)
        for person in range(people):
            centre = rng.normal(size=512)
            for photo in range(photos):
                rows.append(_add(writer, rng, person, photo, centre, person >= people - held_out))
        writer.close()
    info = DatasetInfo(
        recogniser="test/rec",
        fingerprint=hashlib.sha256(repr(rows).encode()).hexdigest(),
        counts={"kept": len(rows)},
        options={},
    )
    write_index(folder / INDEX, table_of(rows), info)
    return folder


def _add(
    writer: ShardWriter, rng: Any, person: int, photo: int, centre: Any, held_out: bool
) -> dict[str, Any]:
    width, height = SIZES[(person + photo) % len(SIZES)]
    pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    picture.save(buffer, "PNG")
    data = buffer.getvalue()
    face = (centre + 0.5 * rng.normal(size=512)).astype(np.float32)
    key = hashlib.sha256(data).hexdigest()[:24]
    caption = f"photo {photo} of a person"
    placed = writer.add(key, data, "png", face, {"identity": str(person), "caption": caption})
    x, y = width / 2, height / 2
    eyes = [x - 8, y - 8, x + 8, y - 8, x, y, x - 6, y + 8, x + 6, y + 8]
    return {
        "key": key, "shard": "00000.tar", "offset": placed.offset, "size": placed.size,
        "face_offset": placed.face_offset, "sha256": hashlib.sha256(data).hexdigest(),
        "source_sha256": "", "identity": f"person {person}",
        "split": "held_out" if held_out else "train", "source": "", "licence": "made",
        "caption": caption, "width": width, "height": height,
        "box": [x - 16, y - 20, x + 16, y + 20], "landmarks": eyes, "det_score": 0.9,
        "faces": 1, "face_size": 32.0, "face_share": 0.2, "blur": 100.0, "yaw": 0.0,
        "pitch": 0.0, "roll": 0.0, "similarity": 0.9 - photo / 100, "phash": "", "group": key,
        "dropped": "", "detail": "",
    }  # fmt: skip


def world(root: Path, **options: Any) -> Path:
    """A dataset and a UNet below ``root``."""
    write_dataset(root / "data", **options)
    write_unet(root / "unet.safetensors")
    return root


@lru_cache(maxsize=1)
def shared() -> Path:
    """One world for all tests that leave it as it is, its caches filled by the first run."""
    root = Path(tempfile.mkdtemp(prefix="infinite-id-train-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return world(root)


def config(root: Path, output: str = "run", **sections: dict[str, Any]) -> TrainConfig:
    """A configuration for ``world(root)``; ``sections`` override entries."""
    values: dict[str, dict[str, Any]] = {
        "run": {"output": str(root / output), "steps": 3, "seed": 7, "device": "cpu",
                "dtype": "float32"},
        "model": {"unet": str(root / "unet.safetensors"), "vae": "microworld", "head_width": 32,
                  "text_encoders": "microworld"},
        "encoder": {"clip_model": "microworld"},
        "data": {"folder": str(root / "data"), "resolution": 64, "bucket_step": 16,
                 "max_aspect": 2.0, "crops_per_photo": 2, "workers": 0},
        "filters": {"min_short_side": 0, "min_face_size": 0, "max_pair_cosine": 1.0},
        "optimiser": {"batch": 2, "precision": "fp32", "rate": 1e-3},
        "log": {"trackers": [], "every": 1000},
        "checkpoints": {"every": 1000},
    }  # fmt: skip
    for name, entries in sections.items():
        values[name] = {**values.get(name, {}), **entries}
    return parse_config(values)


def bits(path: Path) -> tuple[bytes, dict[str, Any]]:
    """All tensors' bytes and the configuration of an adapter file (its header has no order)."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return raw[start:], json.loads(read_header(path).metadata["config"])


# --- processes -------------------------------------------------------------------------------

CHILD = Path(__file__).with_name("train_child.py")
ROOT = Path(__file__).resolve().parents[2]


def write_config(path: Path, settings: TrainConfig) -> Path:
    """The configuration as a TOML file: JSON's values are TOML's, but for null."""
    lines = []
    for section, entries in settings.to_json().items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in entries.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@lru_cache(maxsize=1)
def _context() -> Any:
    """Processes that start with everything imported, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train.loop", "diffusers", "accelerate"])
    return context


class Child:
    """A training run in a process of its own."""

    def __init__(
        self,
        settings: TrainConfig,
        *,
        rank: int = 0,
        world: int = 1,
        port: int = 0,
        **environment: str,
    ):
        output = Path(settings.run.output)
        output.mkdir(parents=True, exist_ok=True)
        self.checkpoints = output / "checkpoints"
        self.log = output / f"log-{rank}.txt"
        environment = {"OMP_NUM_THREADS": "1", **environment}
        if world > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        path = write_config(output / "config.toml", settings)
        inner = {
            "arguments": ["train", "--config", str(path)],
            "environment": environment,
            "log": str(self.log),
        }
        with _python_path():
            self.process = _context().Process(
                target=runpy.run_path, args=(str(CHILD), inner, "__main__")
            )
            self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """The exit status."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running:\n{self.text()}"
        return self.process.exitcode

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until a checkpoint of ``step`` is there; the run must not have ended by then."""
        end = time.monotonic() + seconds
        while not (self.checkpoints / f"step-{step:08d}").is_dir():
            assert self.process.is_alive() and time.monotonic() < end, self.text()
            time.sleep(0.002)
        assert self.process.is_alive(), self.text()

    def text(self) -> str:
        """All that the run printed."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


@contextmanager
def _python_path() -> Iterator[None]:
    """The fork server imports the trainer before it hears of this process's sys.path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, str(ROOT)]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
