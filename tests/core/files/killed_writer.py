"""Writers that die at every moment: run by test_files in a process of its own (POSIX).

Forks children that write the same files for ever, kills them with SIGKILL and reads what is
left. Prints one JSON line: how often, what was wrong, and what lies in the folder.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))

from infinite_id_core import errors  # noqa: E402
from infinite_id_core.files import adapters, checked, identities, infinite_id_format  # noqa: E402
from infinite_id_core.method.adapter import infinite_id_adapter  # noqa: E402
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity  # noqa: E402
from infinite_id_core.method.records import AdapterConfig  # noqa: E402

CONFIG = AdapterConfig(clip_width=64, context_width=64, recogniser="r", clip_model="c")
ROUNDS = 8


def write(folder: Path, value: float) -> None:
    """One generation of both files; every number in them is ``value``."""
    adapter = infinite_id_adapter(CONFIG, {"mid_block.attentions.0.transformer_blocks.0": 64})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(value)
    infinite_id_format.write_adapter(folder / "adapter.safetensors", adapter)
    identity = face_clip_identity(
        face=torch.full((8, 512), value),
        clip=torch.full((8, 257, 64), value),
        weight=torch.full((8,), value),
        config=IdentityConfig(recogniser="r", clip_model="c"),
    )
    identities.write_identity(folder / "identity.safetensors", identity)


def values(folder: Path) -> list[set[float]]:
    """The distinct numbers in each file; raises where a file is not whole."""
    adapter = adapters.read_adapter(folder / "adapter.safetensors").state_dict()
    identity = identities.read_identity(folder / "identity.safetensors")
    parts = [
        list(adapter.values()),
        [identity["face"].value, identity["clip"].value, identity.weight],
    ]
    return [{float(v) for t in tensors for v in t.unique()} for tensors in parts]


def forever(folder: Path, value: float) -> None:
    """Write generation after generation."""
    while True:
        write(folder, value)


def killed_at(name: str) -> Callable[[Path, float], None]:
    """Die at the call of ``os.fsync`` or ``os.replace``, the second after the data is complete."""

    def run(folder: Path, value: float) -> None:
        setattr(os, name, lambda *a: os.kill(os.getpid(), signal.SIGKILL))
        write(folder, value)

    return run


def killed_half_way(folder: Path, value: float) -> None:
    """Die with half of the bytes written."""

    def half(tensors: object, path: Path, *rest: object, **more: object) -> None:
        with path.open("wb") as file:
            file.write(b"\x10" * 100)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    checked.save_tensors = half
    write(folder, value)


def full_disk(folder: Path, value: float) -> None:
    """No file may grow beyond 64 kB: the write fails in the system call, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    try:
        write(folder, value)
    except errors.NotWrittenError as error:
        os._exit(7 if str(error.path) == str(folder / "adapter.safetensors") else 1)
    os._exit(0)


def start(run: Callable[[Path, float], None], folder: Path, value: float) -> int:
    """Fork a child that runs ``run``."""
    child = os.fork()
    if child == 0:
        try:
            run(folder, value)
        finally:
            os._exit(3)
    return child


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    wrong: list[str] = []
    write(folder, 1.0)
    exits = {}
    for run in (killed_half_way, killed_at("fsync"), killed_at("replace"), full_disk):
        status = os.waitpid(start(run, folder, 99.0), 0)[1]
        exits[run.__qualname__ + str(len(exits))] = os.waitstatus_to_exitcode(status)
        if values(folder) != [{1.0}, {1.0}]:
            wrong.append(f"{run}: {values(folder)}")
    left_by_full_disk = [p.name for p in folder.iterdir() if ".part" in p.name]
    seen: set[float] = set()
    rounds = 0
    # On a busy machine a child may be dead before its first write is through: go on.
    while rounds < ROUNDS or (not {2.0, 3.0} <= seen and rounds < 20 * ROUNDS):
        rounds += 1
        children = [start(forever, folder, value) for value in (2.0, 3.0)]
        for child in children:  # the second writes on while the first is dead
            time.sleep(chance.uniform(0.0, 0.06))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found = values(folder)
            seen |= set().union(*found)
            if any(len(numbers) != 1 for numbers in found):
                wrong.append(f"mixed generations: {found}")
    print(
        json.dumps(
            {
                "exits": list(exits.values()),
                "wrong": wrong,
                "parts": len(left_by_full_disk),
                "seen": sorted(seen),
                "files": sorted(p.name for p in folder.glob("*.safetensors")),
            }
        )
    )


if __name__ == "__main__":
    main()
