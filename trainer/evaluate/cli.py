"""The command line of ``evaluate``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from infinite_id_core.errors import OptionError
from infinite_id_core.faces.pack import DETECTOR_SIZE
from infinite_id_core.scores.metrics import BootstrapOptions

from ..models.source import MICROWORLD
from ..models.unet_names import HEAD_WIDTH
from ..painter import DTYPES, Sources
from ..sheets import save_image
from ..train.memory import memory_errors
from .backbones import CHANNEL_ORDER, OnnxInput, clip_model, face_reader
from .figures import SheetOptions, contact_sheet, scatter
from .manifest import Row, check_files, read_manifest, write_manifest
from .measure import Measured, Progress, measure
from .methods import NO_ADAPTER, Method, parse_method
from .people import Person, read_people
from .pictures import Setting, make_missing, plan, slug
from .prompt_sets import EvalPrompt, known_sets, load_prompt_set
from .summary import Summary, markdown, summarise, unreadable, write_pictures, write_summary

MAX_SEEDS = 1000


@memory_errors("evaluating", "give a smaller --batch or --size, or --device cpu")
def main(argv: Sequence[str]) -> int:
    """Make and score pictures, write the report. Returns the exit status."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    values = _parser().parse_args(argv)
    people = read_people(values.references) if values.references else []
    rows = [row for path in values.manifest for row in _rows_of(path)]
    if values.method or values.adapter:
        rows += _make(values, people)
    if not rows:
        raise OptionError(
            "Nothing to evaluate. Give --adapter (or --method) with --references and --prompts, "
            "to make pictures; or --manifest, to score those of any method."
        )
    options = BootstrapOptions(resamples=values.resamples, level=values.level)
    sheets = SheetOptions(
        people=values.sheet_people, prompts=values.sheet_prompts, side=values.sheet_side
    )
    measured = _measure(values, rows, people)
    summary = summarise(measured, options)
    _write(values, measured, summary, sheets)
    print(markdown(measured, summary, _settings(values), values.output), end="")
    for path, why in unreadable(measured).items():
        print(f"{path}: {why}", file=sys.stderr)
    print(f"\n{values.output}", file=sys.stderr)
    return 0


def _rows_of(path: Path) -> list[Row]:
    rows = read_manifest(path)
    check_files(path, rows)
    return rows


def _make(values: argparse.Namespace, people: Sequence[Person]) -> list[Row]:
    """The pictures of the methods that run here."""
    if not people:
        raise OptionError("To make pictures, give --references: a folder of photos of people.")
    prompts = _prompts(values)
    defaults = Method(
        name="infinite-id",
        adapter=values.adapter or NO_ADAPTER,
        steps=values.steps,
        guidance=values.guidance,
        scheduler=values.scheduler,
        negative=values.negative,
    )
    methods = [parse_method(text, defaults) for text in values.method] or [defaults]
    device = values.device or ("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(
        sources=Sources(
            unet=values.unet,
            vae=values.vae,
            text_encoders=values.text_encoders,
            head_width=values.head_width,
        ),
        face_models=values.face_models,
        clip_weights=values.clip_weights,
        width=values.size,
        height=values.size,
        batch=values.batch,
        device=device,
        dtype=DTYPES[values.precision or ("fp16" if device == "cuda" else "fp32")],
    )
    tasks = plan(
        values.output / "pictures", setting, methods, people[: values.people or None], prompts,
        seeds(values.seeds),
    )  # fmt: skip
    missing = sum(not task.path.is_file() for task in tasks)
    with _bar("make", missing) as progress:
        make_missing(tasks, setting, progress)
    rows = [task.row for task in tasks]
    write_manifest(values.output / "manifest.csv", rows)
    return rows


def _prompts(values: argparse.Namespace) -> list[EvalPrompt]:
    sets = [load_prompt_set(name, values.subject) for name in values.prompts]
    prompts = list(dict.fromkeys(prompt for one in sets for prompt in one))
    if not prompts:
        raise OptionError(f"Give --prompts: one of {', '.join(known_sets())}, or a file.")
    return prompts


def seeds(text: str) -> list[int]:
    """``"0-3,7"`` -> [0, 1, 2, 3, 7]. Raises ``OptionError``."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            span = range(int(first), int(last or first) + 1)
            if not span or len(span) > MAX_SEEDS:
                raise ValueError(part)
            found += span
    except ValueError as error:
        raise OptionError(
            f"Seeds are numbers and ranges such as 0-3,7 (at most {MAX_SEEDS}); got {text!r}."
        ) from error
    return list(dict.fromkeys(found))


def _measure(values: argparse.Namespace, rows: Sequence[Row], people: Sequence[Person]) -> Measured:
    options = OnnxInput(
        mean=values.onnx_mean, deviation=values.onnx_deviation, order=values.onnx_order
    )
    reader = face_reader(values.face, values.detector, options, values.detector_size)
    clip = clip_model(values.clip)
    with _bar("score", len({row.image for row in rows})) as progress:
        return measure(rows, reader, clip, people, progress)


def _write(
    values: argparse.Namespace, measured: Measured, summary: Summary, sheets: SheetOptions
) -> None:
    folder: Path = values.output
    write_pictures(folder / "pictures.csv", measured)
    write_summary(folder, measured, summary, _settings(values))
    for method in summary.methods:
        rows = [row for row in measured.rows if row.method == method.method]
        save_image(contact_sheet(rows, sheets), folder / f"contact_{slug(method.method)}.png")
    scatter(folder / "scatter.png", summary.methods)


def _settings(values: argparse.Namespace) -> dict[str, Any]:
    """For the record: every option of the run."""
    return {
        key: [str(v) for v in value] if isinstance(value, list)
        else str(value) if isinstance(value, Path) else value
        for key, value in vars(values).items()
    }  # fmt: skip


@contextmanager
def _bar(title: str, total: int) -> Iterator[Progress]:
    with tqdm(
        total=total, desc=title, unit="picture", dynamic_ncols=True, disable=not total
    ) as bar:
        yield lambda: _advance(bar)


def _advance(bar: Any) -> None:
    bar.update(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer evaluate",
        description="Likeness (M_face, CLIP-I) and prompt (CLIP-T) scores of one or more methods, "
        "Eq. 9-11. The same command goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="folder for pictures and report")

    made = parser.add_argument_group("pictures to make here")
    add = made.add_argument
    add("--adapter", default="", help=f"adapter file, or {MICROWORLD}")
    add("--method", action="append", default=[], metavar="NAME:key=value,...",
        help="several times: several methods, each with its own adapter, strength, references, "
        "mixing, style, style_strength, merge_text, text_stream, steps, guidance, scheduler, "
        "negative, negative_identity, negative_mixing; adapter=none: the plain model")  # fmt: skip
    add("--references", type=Path, help="folder of photos, or of a subfolder of photos a person; "
        "a person's first photo is the reference")  # fmt: skip
    add("--people", type=int, default=0, help="only the first so many; 0: all")
    add("--prompts", action="append", default=[],
        help=f"{', '.join(known_sets())}, or a file; may be given several times")  # fmt: skip
    add("--subject", default="a person", help="what {person} in a prompt becomes")
    add("--seeds", default="0", help="such as 0-3,7")
    add("--unet", default=MICROWORLD, help="SDXL checkpoint, diffusers folder, or microworld")
    add("--vae", default="", help="empty: the one inside --unet")
    add("--text-encoders", default="", help="empty: those inside --unet")
    add("--face-models", default=MICROWORLD, help="for the identity: ROOT/models/PACK")
    add("--clip-weights", default="", help="for the identity: the encoder the adapter names")
    add("--size", type=int, default=1024, help="pixels of a side")
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=5.0)
    add("--scheduler", default="normal")
    add("--negative", default="", help="negative prompt")
    add("--batch", type=int, default=4, help="pictures sampled together")
    add("--device", default="", help="empty: cuda if there is one, else cpu")
    add("--precision", choices=("", *DTYPES), default="", help="empty: fp16 on cuda, else fp32")
    add("--head-width", type=int, default=HEAD_WIDTH, help="of the UNet's attention heads")

    given = parser.add_argument_group("pictures of any method")
    given.add_argument(
        "--manifest", type=Path, action="append", default=[],
        help="CSV or JSON lines with image, reference, identity, prompt, seed, method; may be "
        "given several times",
    )  # fmt: skip

    scores = parser.add_argument_group("scores")
    add = scores.add_argument
    add("--face", default=MICROWORLD, help="E_face: ROOT/models/PACK, a .onnx file, or microworld. "
        "Take one that did not condition the pictures")  # fmt: skip
    add("--detector", default=MICROWORLD, help="for a .onnx file: the pack that finds faces")
    add("--detector-size", type=int, default=DETECTOR_SIZE, help="pixels")
    add("--onnx-mean", type=float, default=127.5, help="its input is (255 x - mean) / deviation")
    add("--onnx-deviation", type=float, default=127.5)
    add("--onnx-order", choices=CHANNEL_ORDER, default="rgb")
    add("--clip", default=MICROWORLD, help="E_clip and E_text: MODEL=FILE, microworld, or none")
    add("--resamples", type=int, default=2000, help="of the bootstrap")
    add("--level", type=float, default=0.95, help="of the intervals")
    add("--sheet-people", type=int, default=12, help="rows of a contact sheet")
    add("--sheet-prompts", type=int, default=12, help="its columns, beside the reference")
    add("--sheet-side", type=int, default=128, help="pixels of its pictures")
    return parser
