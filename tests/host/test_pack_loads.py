"""ComfyUI's own loader takes the pack, with every node, and nothing heavy comes along."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

from tools.node_ids import NODE_IDS

ROOT = Path(__file__).resolve().parents[2]


def test_every_node_registers(pack: ModuleType) -> None:
    mappings = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    missing = [node_id for node_id in NODE_IDS if node_id not in mappings]
    assert missing == []


def test_entry_point_is_v3_only(pack: ModuleType) -> None:
    # ComfyUI looks for the V1 name first, and then never calls the V3 entry point.
    assert callable(pack.comfy_entrypoint)
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")


def test_the_host_reads_that_it_is_supported(pack: ModuleType) -> None:
    parser = importlib.import_module("comfy_config.config_parser")
    read = parser.extract_node_configuration(str(ROOT)).project.supported_comfyui_version
    assert str(SpecifierSet(read)) == ">=0.3.64"
    assert importlib.import_module("comfyui_version").__version__ in SpecifierSet(read)


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_schema_is_valid(pack: ModuleType, node_id: str) -> None:
    node = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[node_id]
    schema = node.GET_SCHEMA()  # ComfyUI validates ids and inputs here
    assert schema.node_id == node_id
    assert schema.category.split("/")[0] == "Infinite-ID"


def test_heavy_libraries_stay_out(pack: ModuleType, comfy_base: Path) -> None:
    script = ROOT / "tools" / "import_pack.py"
    folder = Path(pack.__file__ or "").parent
    done = subprocess.run(
        [sys.executable, script, os.environ["COMFYUI_PATH"], comfy_base, folder],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"], done.stderr[-2000:]
    assert found["heavy"] == []
