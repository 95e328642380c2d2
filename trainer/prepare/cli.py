"""``python -m trainer prepare INPUT OUTPUT [options]``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .options import ENGINES, FACE_CHOICES, KINDS, Places, PrepareOptions, RunOptions
from .parts import files_not_used, photos_left_out

_HELP = {
    "kind": "how the input is laid out: a folder per person, an unlabelled heap, .tar shards",
    "identity_field": "webdataset: JSON entry that names the person (default: group by face)",
    "licence": "licence of photos that come without one",
    "detector_size": "side of the detector's input, pixels",
    "min_detection": "the detector's confidence from which a face counts",
    "faces": "which faces of a photo are used: only the largest (in a person's folder: the one "
    "most like the person), or all, each for its own person",
    "max_side": "re-encode photos with a longer side once at this side, pixels",
    "max_pixels": "skip photos that would decode to more pixels",
    "max_bytes": "skip files larger than this",
    "neighbours": "grouping: nearest neighbours looked at per face",
    "link_cosine": "grouping: faces at least this alike are linked",
    "purify_cosine": "leave out photos less like their person's centroid; -1 keeps all",
    "duplicate_bits": "near-duplicates: differing bits of the 64-bit picture hash; -1 is off",
    "duplicate_cosine": "near-duplicates: and faces at least this alike",
    "min_photos": "leave out people with fewer usable photos",
    "held_out": "share of people kept out of training",
    "seed": "another seed holds out other people",
    "shard_bytes": "close a shard at the person after this size",
    "engine": "who does the work: this machine's processes, or Ray Data",
    "workers": "processes or actors (default: one per two cores)",
    "threads": "threads of each worker's models (default: cores / workers)",
    "gpus_per_worker": "Ray: GPUs reserved for each actor",
    "provider": "ONNX Runtime provider: auto, cpu, cuda, rocm, coreml, directml",
    "ray_address": "Ray: address of a cluster (default: RAY_ADDRESS, else this machine)",
}
_CHOICES = {"kind": KINDS, "faces": FACE_CHOICES, "engine": ENGINES}


def main(argv: Sequence[str]) -> int:
    """Run ``prepare`` with command-line options and print what it made."""
    values = vars(_parser().parse_args(argv))
    from ..models.face_models import pack_folder

    places = Places(
        source=values["input"],
        output=values["output"],
        face_models=pack_folder(values["face_models"]),
    )
    run = RunOptions(
        **_values(RunOptions, values), report=values["report"], progress=values["progress"]
    )
    from .run import prepare  # after the options are known to be good

    summary = prepare(places, PrepareOptions(**_values(PrepareOptions, values)), run)
    counts = summary.info.counts
    print(
        f"{counts['kept']} photos of {summary.identities} people ({summary.held_out} held out) in "
        f"{summary.shards} shards, {summary.bytes / 2**20:.1f} MB, {summary.seconds:.1f} s"
    )
    print(f"photos left out: {_listed(photos_left_out(counts)) or 'none'}")
    others = _listed(files_not_used(counts))
    if others:
        print(f"other files, not used: {others}")
    if summary.more_faces:
        print(
            f"{summary.more_faces} of these photos show more than one face; one face of each was "
            "used. --faces all uses each for its own person."
        )
    if run.report:
        print(f"report: {values['output'] / 'report.html'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer prepare",
        description="Photos to training shards and an index. Run it again after a crash: finished "
        "parts are kept.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("input", type=Path, help="folder of photos, of people's folders, or shards")
    parser.add_argument("output", type=Path, help="folder of the dataset, new or half-done")
    parser.add_argument(
        "--face-models",
        required=True,
        metavar="ROOT/models/PACK",
        help="insightface pack: a folder of ONNX files with a detector and a recogniser; or "
        "microworld, the embedded one",
    )
    for options in (PrepareOptions, RunOptions):
        group = parser.add_argument_group(
            "what changes the result" if options is PrepareOptions else "how it is made"
        )
        for field in fields(options):
            if field.name not in _HELP:
                continue
            group.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default),
                default=field.default,
                choices=_CHOICES.get(field.name),
                help=_HELP[field.name],
            )
    parser.set_defaults(report=True, progress=True)
    for name, what in (("report", "report.html"), ("progress", "progress bars")):
        parser.add_argument(
            f"--no-{name}",
            dest=name,
            action="store_false",
            default=argparse.SUPPRESS,  # so that the help does not say "default: True"
            help=f"no {what}",
        )
    return parser


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.items())


def _values(options: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in fields(options) if f.name in _HELP}
