"""The pack's model folders stand in ComfyUI's registry as soon as the pack is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths


def test_folders_are_known(pack: Any, comfy_base: Path) -> None:
    for kind in ("infinite_id", "infinite_id_identities"):
        paths, extensions = folder_paths.folder_names_and_paths[kind]
        assert str(comfy_base / "models" / kind) in paths
        assert extensions == {".safetensors"}
