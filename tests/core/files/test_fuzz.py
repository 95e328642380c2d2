"""A few mutated files of every kind, the same in each run; fuzz_files.py makes any number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("fuzz_files.py")


def test_mutated_files_give_named_errors_and_nothing_else():
    """In a process of its own: an audit hook cannot be taken off again."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--count", "500", "--seed", "1"],
        capture_output=True, text=True, encoding="utf-8", timeout=500, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found = {said["kind"]: said for said in map(json.loads, done.stdout.splitlines())}
    assert set(found) == {
        "adapter", "identity", "features", "published", "pickle", "tar", "index"
    }  # fmt: skip
    for kind, said in found.items():
        assert said["faults"] == []
        # Both happen, or the mutations are too weak or too strong to tell anything.
        assert said["accepted"] > 0 and sum(said["refused"].values()) > 0, kind
