"""Writes docs/images/workflow_*.png: every embedded workflow in ComfyUI's page, after a run.

python -m tools.screenshots       # needs ComfyUI and a Chromium
"""

from __future__ import annotations

import json
import sys

from PIL import Image

from infinite_id_core.files.pictures import read_picture

from .comfy_live import ComfyServer
from .make_workflows import FOLDER, ROOT, WORKFLOWS
from .page import Page, find_browser

IMAGES = ROOT / "docs" / "images"


def main() -> int:
    from run import find_host

    host, browser = find_host(), find_browser()
    if host is None or browser is None:
        print(f"Needs ComfyUI ({host}) and a Chromium ({browser}).", file=sys.stderr)
        return 1
    IMAGES.mkdir(parents=True, exist_ok=True)
    # No cache: a page shows the pictures of the nodes that ran for it.
    extra = ("--cache-none",)
    with ComfyServer(host=host, pack=ROOT, cpu=True, extra_args=extra) as server:
        for name in WORKFLOWS:
            # A page each: lists of files are read when it opens.
            with Page(browser, server.url, settings={"Comfy.Graph.CanvasInfo": False}) as page:
                graph = json.loads((FOLDER / f"{name}.micro.json").read_text(encoding="utf-8"))
                page.open_workflow(graph, f"{name}.micro")
                page.queue()
                page.until("!document.querySelector('[data-testid=queue-notification-banner]')")
                page.fit()
                path = IMAGES / f"workflow_{name}.png"
                page.screenshot(path)
                shot = read_picture(path.read_bytes())
                shot.convert("P", palette=Image.Palette.ADAPTIVE).save(path, optimize=True)
                print(path.relative_to(ROOT), path.stat().st_size, page.trouble(), page.problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
