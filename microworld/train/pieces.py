"""Which piece needs which, the call that makes one, and the one that makes all of them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from .. import face_models
from . import adapter, export, faces, open_clip, unet, vae
from .pictures import Pictures, pictures
from .seen import seen

# In the order in which they are started when several could be: the longest first.
NEEDS: dict[str, tuple[str, ...]] = {
    "vae": (),  # renders the pictures, too
    "unet": ("vae",),
    "detector": (),
    "attributes": ("vae",),
    "recogniser": ("vae", "detector"),
    "open_clip": ("recogniser",),
    "photos": ("vae", "recogniser", "open_clip"),
    "scorer": ("recogniser",),
    "base": ("unet", "photos", "attributes", "scorer"),
    "adapter": ("base",),
    "entangled": ("base",),
}
TIMES = "seconds.json"  # what each piece took, interrupted tries included


class PieceFailedError(RuntimeError):
    """A piece's process ended with an error; its log says which."""


def train_piece(name: str, folder: Path) -> None:
    """Make one piece, or finish it, from the pieces it needs. `name`: a key of NEEDS."""
    if name == "vae":
        model, data = vae.run(folder), pictures(folder)
        vae.refine_decoder(folder, model, data, vae.latents(folder, model, data))
    elif name == "unet":
        unet.run(folder, vae.run(folder))
    elif name == "recogniser":
        faces.recogniser(folder, _seen(folder))
    elif name == "scorer":
        faces.scorer(folder, _seen(folder))
    elif name == "attributes":
        faces.attribute_reader(folder, pictures(folder))
    elif name == "open_clip":
        open_clip.run(folder, _seen(folder))
    elif name == "detector":
        path = folder / "det.onnx"
        if not path.exists():
            part = path.with_suffix(".part")
            face_models.export_detector(face_models.train_detector(), part)
            part.replace(path)
    elif name == "photos":  # the trainer reads files, as anybody's
        for model_file in ("vae", "detector", "recogniser", "open_clip"):
            export.EXPORTS[model_file](folder)
        adapter.fill_caches(adapter.prepare(folder))
    elif name == "base":
        for model_file in export.BASE:
            export.EXPORTS[model_file](folder)
    elif name in ("adapter", "entangled"):
        adapter.run(folder, name, adapter.ENTANGLED if name == "entangled" else ())
    else:
        raise ValueError(f"Expected a piece of the microworld ({', '.join(NEEDS)}), got {name!r}.")


def with_needs(names: Iterable[str]) -> list[str]:
    """`names` and all that they need, each after what it needs."""
    wanted: set[str] = set()
    open_ = list(names)
    while open_:
        name = open_.pop()
        if name not in wanted:
            wanted.add(name)
            open_ += NEEDS[name]
    return [name for name in NEEDS if name in wanted]


def train_all(
    names: Iterable[str],
    folder: Path,
    *,
    jobs: int = 2,
    threads: int = 2,
    make: Callable[[str, Path], None] = train_piece,
) -> None:
    """Make pieces and what they need, `jobs` side by side, each in a process of its own.

    Each has its share of `threads` and a log, `folder/logs/<piece>.log`; `folder/seconds.json`
    says what each took. What a killed run had made stays; the next goes on from there. Raises
    PieceFailedError; what is running beside the failed piece is then ended, not lost.
    """
    todo = with_needs(names)
    done: set[str] = set()
    running: dict[str, multiprocessing.process.BaseProcess] = {}
    started: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tqdm(total=len(todo), desc="pieces", dynamic_ncols=True) as bar:
        try:
            while len(done) < len(todo):
                for name in todo:
                    free = len(running) < jobs and name not in done and name not in running
                    if free and done.issuperset(NEEDS[name]):
                        share = max(1, threads // jobs)
                        process = context.Process(target=_child, args=(make, name, folder, share))
                        process.start()
                        running[name], started[name] = process, time.monotonic()
                time.sleep(0.5)
                bar.set_postfix_str(" | ".join(_last_line(folder, name) for name in running))
                for name in [n for n, process in running.items() if not process.is_alive()]:
                    code = running.pop(name).exitcode
                    _add_seconds(folder, name, time.monotonic() - started[name])
                    if code:
                        raise PieceFailedError(
                            f"{name} ended with status {code}; {_log(folder, name)} says why. The "
                            "same command goes on from what is made."
                        )
                    done.add(name)
                    bar.update()
        finally:
            for name, process in running.items():
                process.terminate()
                process.join()
                _add_seconds(folder, name, time.monotonic() - started[name])
    print(f"{len(todo)} pieces, {(time.monotonic() - began) / 60:.0f} minutes; {folder / TIMES}")


def _child(make: Callable[[str, Path], None], name: str, folder: Path, threads: int) -> None:
    """One piece, in its own process, all that it says in its log."""
    log = os.open(_log(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    make(name, folder)


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _last_line(folder: Path, name: str) -> str:
    """The end of a piece's log, where its progress bar is."""
    with contextlib.suppress(OSError):
        text = _log(folder, name).read_bytes()[-400:].decode(errors="replace")
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if lines:
            return lines[-1][:60]
    return name


def _add_seconds(folder: Path, name: str, seconds: float) -> None:
    path = folder / TIMES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = round(known.get(name, 0.0) + seconds, 1)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    part.replace(path)


def _seen(folder: Path) -> Pictures:
    model, data = export.autoencoder(folder), pictures(folder)
    return seen(folder, model, vae.latents(folder, model, data), data)
