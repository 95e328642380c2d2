"""`run.py demo`, the part that runs inside the virtual environment."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .comfy_live import ComfyLiveError, ComfyServer
from .workflow_api import WorkflowError

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "workflows" / "one_face.micro.json"
STYLES = Path(__file__).with_name("styles.json")


class DemoError(Exception):
    """The demo cannot do what it was asked; the message says why."""


def astronaut(folder: Path) -> Path:
    """The photo of Eileen Collins (NASA, public domain) that comes with scikit-image."""
    from PIL import Image
    from skimage import data

    path = folder / "astronaut.png"
    photo = data.astronaut()  # type: ignore[no-untyped-call]
    Image.fromarray(photo).save(path)
    return path


def styled(prompt: str, negative: str, style: str | None) -> tuple[str, str]:
    """The prompt pair in one of the styles of styles.json."""
    if style is None:
        return prompt, negative
    styles = json.loads(STYLES.read_text(encoding="utf-8"))
    if style not in styles:
        raise DemoError(f"--style {style}: expected one of {', '.join(styles)}.")
    chosen = styles[style]
    return (
        chosen["positive"].replace("{prompt}", prompt),
        ", ".join(part for part in (negative, chosen["negative"]) if part),
    )


def upstream(prompt: dict[str, Any], node_id: str, class_type: str) -> dict[str, Any] | None:
    """The nearest node of a type that feeds this one, itself included."""
    waiting, seen = [node_id], set()
    while waiting:
        current = waiting.pop(0)
        if current in seen:
            continue
        seen.add(current)
        node: dict[str, Any] = prompt[current]
        if node["class_type"] == class_type:
            return node
        waiting += [v[0] for v in node["inputs"].values() if isinstance(v, list)]
    return None


def fill_in(prompt: dict[str, Any], options: argparse.Namespace, photo: str) -> None:
    """Put the photo, the texts and the seed into the workflow's own nodes."""
    written: set[int] = set()  # two samplers may share a text
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "LoadImage":
            inputs["image"] = photo
        seeds = inputs.keys() & {"seed", "noise_seed"}
        if not seeds or not isinstance(inputs.get("positive"), list):
            continue  # not a sampler
        if options.seed is not None:
            inputs.update(dict.fromkeys(seeds, options.seed))
        positive, negative = (
            upstream(prompt, inputs[side][0], "CLIPTextEncode") for side in ("positive", "negative")
        )
        if positive is None or negative is None or id(positive) in written:
            continue
        written.add(id(positive))
        positive["inputs"]["text"], negative["inputs"]["text"] = styled(
            options.prompt if options.prompt is not None else positive["inputs"]["text"],
            negative["inputs"]["text"],
            options.style,
        )


class ProgressBar:
    """One bar for the whole prompt: nodes done, and the share of the one at work."""

    def __init__(self, prompt: dict[str, Any]) -> None:
        self._titles = {key: node["_meta"]["title"] for key, node in prompt.items()}
        self._done: set[str] = set()
        self._current: str | None = None
        self._bar = tqdm(
            total=len(prompt),
            unit="node",
            bar_format="{l_bar}{bar}| {n:.1f}/{total} nodes [{elapsed}]{postfix}",
            file=sys.stderr,
        )

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "execution_cached":
            self._done.update(data["nodes"])
            self._show(0.0)
        elif kind == "executing":
            if self._current is not None:
                self._done.add(self._current)
            self._current = data["node"]
            self._bar.set_description(self._titles.get(str(self._current), "done"), refresh=False)
            self._bar.set_postfix_str("", refresh=False)
            self._show(0.0)
        elif kind == "progress" and data.get("max"):
            self._bar.set_postfix_str(f"step {data['value']}/{data['max']}", refresh=False)
            self._show(data["value"] / data["max"])

    def _show(self, share: float) -> None:
        done = len(self._done - {self._current}) if self._current else len(self._done)
        self._bar.n = min(done + share, self._bar.total)
        self._bar.refresh()

    def close(self, *, done: bool) -> None:
        if done:
            self._bar.n = self._bar.total
            self._bar.refresh()
        self._bar.close()


def save(folder: Path, data: bytes) -> Path:
    """Write demo-<n>.png with the first free n."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"demo-{number}.png"
        try:
            with path.open("xb") as file:
                file.write(data)
            return path.resolve()
        except FileExistsError:
            number += 1


def starting() -> tuple[Callable[[float], None], Callable[[], None]]:
    """A line that counts the seconds until the server answers: (tick, finish)."""
    bar = tqdm(bar_format="{desc}", desc="starting ComfyUI", file=sys.stderr)

    def tick(seconds: float) -> None:
        bar.set_description_str(f"starting ComfyUI: {seconds:.0f} s")

    return tick, bar.close


def make_picture(server: ComfyServer, options: argparse.Namespace) -> Path:
    """One picture from the running server; returns where it was written."""
    with tempfile.TemporaryDirectory(prefix="infinite-id-demo-") as folder:
        photo = server.upload(options.reference or astronaut(Path(folder)))
    prompt = server.to_api(json.loads(options.workflow.read_text(encoding="utf-8")))
    fill_in(prompt, options, photo)
    bar = ProgressBar(prompt)
    done = False
    try:
        result = server.run(prompt, on_event=bar)
        done = True
    finally:
        bar.close(done=done)
    images = result.images()
    if not images:
        raise DemoError(f"{options.workflow} ran, but no node of it saved a picture.")
    return save(options.output, server.fetch(images[-1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.demo")
    parser.add_argument("--host", type=Path, required=True)
    parser.add_argument("--workflow", type=Path, default=WORKFLOW)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--prompt")
    parser.add_argument("--style")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, default=ROOT / "output")
    parser.add_argument("--port", type=int)
    return parser.parse_args()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, interrupt)  # so that the server is stopped on this way out too
    server = ComfyServer(host=options.host, pack=ROOT, port=options.port)
    try:
        styled("", "", options.style)  # a wrong name is told before anything is started
        tick, finish = starting()
        try:
            server.start(on_wait=tick)
        finally:
            finish()
        path = make_picture(server, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ComfyLiveError, DemoError, WorkflowError, OSError) as error:
        tail = server.log_tail()  # empty once it is stopped: the error then carries the log
        if tail:
            print(f"\nThe end of ComfyUI's log:\n{tail}\n", file=sys.stderr)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        server.stop()
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
