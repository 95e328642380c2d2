"""What importing the pack adds to ComfyUI's start (promise: less than 0.3 s).

    .venv/bin/python benchmarks/import_time.py [--runs 5]

Each run is a fresh process that first imports all that ComfyUI imports before it comes to the
packs, then loads this one with ComfyUI's own loader. ComfyUI is found as run.py finds it.
Exit code 1 where the median is over the promise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from run import find_host  # noqa: E402 - found through the line above
from tools.comfy_live import PACK_FOLDER, copy_pack  # noqa: E402

PROMISE = 0.3  # seconds


def measure(host: Path, base: Path, pack: Path) -> dict[str, float]:
    """One fresh process: seconds of the host, seconds of the pack, modules the pack brought."""
    script = ROOT / "tools" / "import_pack.py"
    done = subprocess.run(
        [sys.executable, str(script), str(host), str(base), str(pack)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if not found["loaded"]:
        raise SystemExit("ComfyUI did not load the pack: python run.py test tells why.")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    host = find_host()
    if host is None:
        raise SystemExit("No ComfyUI found: set COMFYUI_PATH, or run python run.py setup.")
    with tempfile.TemporaryDirectory(prefix="infinite-id-import-") as folder:
        base = Path(folder)
        pack = copy_pack(ROOT, base / "custom_nodes" / PACK_FOLDER)
        measure(host, base, pack)  # writes the byte code, as a user's first start does
        print(f"{'run':>3}  {'ComfyUI s':>9}  {'pack s':>7}  {'ratio':>7}  {'modules':>7}")
        seconds = []
        for run in range(1, options.runs + 1):
            found = measure(host, base, pack)
            seconds.append(found["pack_seconds"])
            ratio = found["pack_seconds"] / found["host_seconds"]
            print(
                f"{run:>3}  {found['host_seconds']:>9.2f}  {found['pack_seconds']:>7.3f}"
                f"  {ratio:>7.2%}  {found['new_modules']:>7}",
                flush=True,
            )
    median = statistics.median(seconds)
    print(f"median {median:.3f} s (promise: under {PROMISE} s)")
    return int(median >= PROMISE)


if __name__ == "__main__":
    sys.exit(main())
