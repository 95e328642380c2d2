"""Published adapters at their true size: seconds to load and peak memory, of every projector kind.

    python benchmarks/published_adapters.py --folder /tmp/adapters

Files with the published names, shapes, containers and dtypes and random numbers; each is read in
a process of its own, once by the pack and once by the plain way (``torch.load`` with
``weights_only`` for pickles, safetensors' ``load_file`` for the others), in turn, with the file in
the system's cache. Memory is the growth of the process's peak above what it held after its
imports; tokens are those of one photo.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

MIB = 2**20


@dataclass(frozen=True)
class Published:
    """A file as its authors publish it."""

    name: str
    family: str
    container: str
    dtype: torch.dtype = torch.float16


FILES = (
    Published("ip-adapter_sdxl.safetensors", "base bigG", "flat safetensors"),
    Published("ip-adapter_sdxl_vit-h.safetensors", "base H", "flat safetensors"),
    Published("full_sdxl.safetensors", "full", "flat safetensors"),
    Published("ip-adapter-plus-face_sdxl_vit-h.safetensors", "plus", "flat safetensors"),
    Published("ip-adapter-faceid_sdxl.bin", "faceid", "nested pickle"),
    Published("ip-adapter-faceid-plusv2_sdxl.bin", "plus v2", "nested pickle"),
    Published("ip-adapter-faceid-portrait_sdxl.bin", "portrait", "nested pickle"),
    Published("instantid.bin", "raw face", "nested pickle", torch.float32),
    Published("pulid_v1.bin", "pulid v1", "pulid pickle", torch.float32),
    Published("pulid_v1.1.safetensors", "pulid v1.1", "flat safetensors"),
)


def _made(file: Published, folder: Path) -> Path:
    from tests.core import published_files

    path = folder / file.name
    if not path.is_file():
        made = published_files.made(file.family, published_files.TRUE, dtype=file.dtype)
        published_files.write(path, file.container, made, published_files.TRUE)
    return path


def _peak() -> float:
    """Of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # a child's ru_maxrss begins with its parent's on Linux
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _ours(path: Path) -> Any:
    from infinite_id_core.files.adapters import read_adapter

    return read_adapter(path)


def _plain(path: Path) -> Any:
    if path.suffix == ".bin":
        return torch.load(path, weights_only=True, map_location="cpu")
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _measure(path: Path, ours: bool) -> dict[str, float]:
    """In this process: what one reading takes."""
    import safetensors.torch  # noqa: F401

    import infinite_id_core.files.adapters  # noqa: F401  # not counted

    before, started = _peak(), time.perf_counter()
    read = (_ours if ours else _plain)(path)
    found = {"seconds": time.perf_counter() - started, "memory": _peak() - before}
    if ours:
        found["tokens"] = _token_seconds(read)
    return found


def _token_seconds(adapter: Any) -> float:
    from infinite_id_core.method.features import Feature
    from infinite_id_core.method.identity import Identity

    features = {
        name: Feature(reading=reading, value=torch.randn(1, *reading.shape), null=None)
        for name, reading in adapter.needs.items()
    }
    started = time.perf_counter()
    with torch.no_grad():
        adapter.tokens(Identity(features=features, weight=torch.ones(1)))
    return time.perf_counter() - started


def _child(path: Path, ours: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path), "ours" if ours else "plain"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(file: Published, path: Path, pairs: int) -> str:
    _child(path, ours=False)  # into the system's cache
    both = [(_child(path, ours=True), _child(path, ours=False)) for _ in range(pairs)]

    def middle(side: int, name: str) -> float:
        return statistics.median(pair[side][name] for pair in both)

    ratios = sorted(mine["seconds"] / plain["seconds"] for mine, plain in both)
    size = path.stat().st_size
    return (
        f"| {file.family} | {path.name} | {size / MIB:.0f} | {middle(0, 'seconds'):.2f} | "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | "
        f"{middle(0, 'memory') / MIB:.0f} ({middle(0, 'memory') / size:.2f}) | "
        f"{middle(1, 'memory') / MIB:.0f} | {middle(0, 'tokens'):.2f} |"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/published"), help="of the files")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--family", action="append", help="only this one; may be given again")
    parser.add_argument("--keep", action="store_true", help="do not delete the files (12 GB)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.measure:
        print(json.dumps(_measure(Path(values.measure[0]), values.measure[1] == "ours")))
        return 0
    values.folder.mkdir(parents=True, exist_ok=True)
    print("| projector | file | MiB | seconds | times plain | peak MiB (of the file) | plain's | "
          "tokens, s |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for file in FILES:
        if values.family and file.family not in values.family:
            continue
        path = _made(file, values.folder)
        print(_row(file, path, values.pairs), flush=True)
        if not values.keep:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
