"""`run.py demo`, the part that runs inside the virtual environment.

Without --prompt and --style: one person in four scenes, each in a style of its own, beside the
reference. With ComfyUI (--host) through a live server; without it through diffusers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from infinite_id_core.errors import InfiniteIDError
from infinite_id_core.files.pictures import read_picture

from .comfy_client import ComfyLiveError, ImageRef, Result
from .comfy_live import ComfyServer
from .strip import strip
from .workflow_api import WorkflowError

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "workflows" / "one_face.micro.json"
STYLES = Path(__file__).with_name("styles.json")

# What each style's picture shows, in words of microworld/captions.py; the reference shows none.
SCENES = {
    "photo": "a person with a big smile, wearing a hat, at the beach",
    "sketch": "a person looking amazed, wearing a scarf, in the mountains",
    "sepia": "a person looking serious, wearing glasses, in a library",
    "neon": "a person smiling, under the night sky",
}


class DemoError(Exception):
    """The demo cannot do what it was asked; the message says why."""


FAILURES = (ComfyLiveError, DemoError, WorkflowError, InfiniteIDError, OSError)


class Host(Protocol):
    """What paints: a live `ComfyServer`, or `without_comfyui.Diffusers`."""

    def upload(self, image: Path | bytes, name: str | None = None) -> str: ...

    def to_api(self, graph: dict[str, Any]) -> dict[str, Any]: ...

    def run(
        self, prompt: dict[str, Any], *, on_event: Callable[[str, dict[str, Any]], None]
    ) -> Result: ...

    def fetch(self, image: ImageRef) -> bytes: ...


def made_portrait() -> bytes:
    """A person of the microworld whom the embedded models have never seen, as PNG."""
    from microworld.people import reference_picture

    buffer = io.BytesIO()
    Image.fromarray(reference_picture()).save(buffer, "PNG")
    return buffer.getvalue()


def wanted(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """The pictures to make, each a prompt and a style for it: one where either is given."""
    if options.prompt is None and options.style is None:
        return [(scene, style) for style, scene in SCENES.items()]
    if options.prompt is None:
        return [(SCENES.get(options.style, SCENES["photo"]), options.style)]
    return [(options.prompt, options.style)]


def styled(prompt: str, negative: str, style: str | None) -> tuple[str, str]:
    """The prompt pair in one of the styles of styles.json.

    What the prompt itself names is taken out of the negative prompt.
    """
    if style is not None:
        styles = json.loads(STYLES.read_text(encoding="utf-8"))
        if style not in styles:
            raise DemoError(f"--style {style}: expected one of {', '.join(styles)}.")
        prompt = styles[style]["positive"].replace("{prompt}", prompt)
        negative = f"{negative}, {styles[style]['negative']}"
    parts = dict.fromkeys(part.strip() for part in negative.split(","))
    words = set(prompt.replace(",", " ").split())
    return prompt, ", ".join(part for part in parts if part and part not in words)


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


def show(prompt: dict[str, Any], photo: str) -> None:
    """Let an uploaded photo stand where the workflow has one, or a made portrait."""
    for node in prompt.values():
        if node["class_type"] in ("LoadImage", "InfiniteIDMicroPortrait"):
            node["class_type"], node["inputs"] = "LoadImage", {"image": photo}


def fill_in(
    prompt: dict[str, Any], photo: str, text: str, style: str | None, seed: int | None
) -> str:
    """Put photo, texts and seed into the workflow's own nodes; returns the prompt they hold."""
    show(prompt, photo)
    written: set[int] = set()  # two samplers may share a text
    for node in prompt.values():
        inputs = node["inputs"]
        seeds = inputs.keys() & {"seed", "noise_seed"}
        if not seeds or not isinstance(inputs.get("positive"), list):
            continue  # not a sampler
        if seed is not None:
            inputs.update(dict.fromkeys(seeds, seed))
        positive, negative = (
            upstream(prompt, inputs[side][0], "CLIPTextEncode") for side in ("positive", "negative")
        )
        if positive is None or negative is None or id(positive) in written:
            continue
        written.add(id(positive))
        positive["inputs"]["text"], negative["inputs"]["text"] = styled(
            text, negative["inputs"]["text"], style
        )
    return styled(text, "", style)[0]


class ProgressBar:
    """One bar for the whole prompt: nodes done, and the share of the one at work."""

    def __init__(self, prompt: dict[str, Any], label: str = "") -> None:
        self._label = label
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
            title = self._titles.get(str(self._current), "done")
            self._bar.set_description(f"{self._label}{title}", refresh=False)
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


@contextlib.contextmanager
def starting() -> Iterator[Callable[[float], None]]:
    """A line that counts the seconds until the server answers."""
    with tqdm(bar_format="{desc}", desc="starting ComfyUI", file=sys.stderr) as bar:
        yield lambda seconds: bar.set_description_str(f"starting ComfyUI: {seconds:.0f} s")


def make_picture(host: Host, prompt: dict[str, Any], label: str = "") -> bytes:
    """What the prompt's last saving node saves."""
    bar = ProgressBar(prompt, label)
    done = False
    try:
        images = host.run(prompt, on_event=bar).images()
        done = True
    finally:
        bar.close(done=done)
    if not images:
        raise DemoError("The workflow ran, but no node of it saved a picture.")
    return host.fetch(images[-1])


def make(host: Host, options: argparse.Namespace) -> Path:
    """The demo's one picture: what was asked for, or the reference and four scenes in a row."""
    reference = options.reference.read_bytes() if options.reference else made_portrait()
    photo = host.upload(reference, options.reference.name if options.reference else "made.png")
    graph = json.loads(options.workflow.read_text(encoding="utf-8"))
    made = []
    pictures = wanted(options)
    for number, (text, style) in enumerate(pictures, 1):
        prompt = host.to_api(graph)
        caption = fill_in(prompt, photo, text, style, options.seed)
        label = f"{number}/{len(pictures)} " if len(pictures) > 1 else ""
        made.append((make_picture(host, prompt, label), caption))
    if len(made) == 1:
        return save(options.output, made[0][0])
    return save(options.output, strip_of(reference, made))


def strip_of(reference: bytes, made: list[tuple[bytes, str]]) -> bytes:
    """The reference and the pictures made from it, captions below, as PNG."""
    opened = [(read_picture(data), caption) for data, caption in made]
    first = read_picture(reference)
    buffer = io.BytesIO()
    strip([(first, "the reference"), *opened]).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@contextlib.contextmanager
def painter(options: argparse.Namespace) -> Iterator[Host]:
    """ComfyUI where there is one, diffusers where there is none; says so."""
    if options.host is not None:
        server = ComfyServer(host=options.host, pack=ROOT, port=options.port)
        try:
            with starting() as tick:
                server.start(on_wait=tick)
            yield server
        except FAILURES:
            tail = server.log_tail()  # empty once it is stopped: the error then carries the log
            if tail:
                print(f"\nThe end of ComfyUI's log:\n{tail}\n", file=sys.stderr)
            raise
        finally:
            server.stop()
        return
    reason = os.environ.get("INFINITE_ID_HOST_MISSING", "No --host was given.")
    print(
        f"[infinite-id] {reason} Without ComfyUI the pictures are made with diffusers.",
        file=sys.stderr,
    )
    # Before torch is loaded: spinning threads are ruinous for tiny models on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .without_comfyui import Diffusers

    yield Diffusers()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.demo")
    parser.add_argument("--host", type=Path, help="ComfyUI's folder; without it: diffusers")
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
    try:
        styled("", "", options.style)  # a wrong name is told before anything is started
        with painter(options) as host:
            path = make(host, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except FAILURES as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
