"""Load a pack as ComfyUI does at its start, in a fresh process; print what that cost, as JSON.

Run by path, so that nothing of ours is imported before:
    python tools/import_pack.py HOST BASE_DIRECTORY PACK
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time

HEAVY = frozenset({"insightface", "onnxruntime", "open_clip", "cv2", "diffusers", "skimage"})


def main(host: str, base: str, pack: str) -> None:
    begun = time.perf_counter()
    sys.path[0] = host  # in place of this script's folder, where main.py's would be
    sys.argv = ["main.py", "--cpu", "--base-directory", base]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("utils.extra_config")  # before nodes.py puts comfy/utils.py in its way
    # What main.py has imported before it comes to the packs, its own extra nodes included.
    importlib.import_module("execution")
    importlib.import_module("server")
    nodes = importlib.import_module("nodes")
    asyncio.run(nodes.init_builtin_extra_nodes())
    before = set(sys.modules)
    host_seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    loaded = asyncio.run(nodes.load_custom_node(pack))
    pack_seconds = time.perf_counter() - begun
    print(
        json.dumps(
            {
                "loaded": loaded,
                "host_seconds": host_seconds,
                "pack_seconds": pack_seconds,
                "heavy": sorted((set(sys.modules) - before) & HEAVY),
                "new_modules": len(set(sys.modules) - before),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
