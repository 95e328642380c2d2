"""The laboratory's commands.

python -m lab train --everything       train every model; resumes where it was
python -m lab train --only unet        one of them, and what it needs
python -m lab export                   write microworld/weights from the checkpoints
python -m lab check                    pictures and scores of the trained base
python -m lab ablate                   the paper's tables, in the microworld
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

RUNS = Path("runs") / "microworld"
BASE = ("vae", "unet", "detector", "recogniser", "scorer", "attributes", "open_clip")
# Besides models: the adapter's photos (drawn, prepared, their features cached).
PIECES = (*BASE, "photos", "adapter", "entangled")
ALIASES = {"clip": "unet"}  # the text encoders are trained with the UNet


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, or resume")
    chosen = train.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--everything", action="store_true")
    chosen.add_argument("--only", choices=(*PIECES, *ALIASES))
    train.add_argument("--jobs", type=int, default=2, help="pieces trained side by side")
    train.add_argument("--threads", type=int, default=2, help="of all pieces together")
    export = commands.add_parser("export", help="write microworld/weights")
    export.add_argument("--only", choices=(*BASE, "adapter"), action="append")
    check = commands.add_parser("check", help="sample the base and score it")
    check.add_argument("--out", type=Path, default=RUNS / "check.png")
    check.add_argument("--pictures", type=int, default=96)
    ablate = commands.add_parser("ablate", help="make and score the ablations' pictures")
    ablate.add_argument("--rows", choices=("core", "open", "sweeps", "all"), default="all")
    ablate.add_argument("--adapter", help="adapter file; default: the embedded one")
    ablate.add_argument("--entangled", help="adapter file of the entangled training")
    ablate.add_argument("--part", default="0/1", help="this process's share, e.g. 0/2")
    ablate.add_argument("--threads", type=int, default=2)
    ablate.add_argument("--score", action="store_true", help="judge what is made, make nothing")
    ablate.add_argument("--out", type=Path, default=Path("docs") / "evidence", help="for --score")
    for command in (train, export, check, ablate):
        command.add_argument("--runs", type=Path, default=RUNS, help="folder of checkpoints")
    options = parser.parse_args(arguments)
    {
        "train": _train,
        "export": _export,
        "check": _check,
        "ablate": _ablate,
    }[options.command](options)


def _train(options: argparse.Namespace) -> None:
    from .train.pieces import train_all

    only = ALIASES.get(options.only, options.only)
    names = PIECES if options.everything else (only,)
    train_all(names, options.runs, jobs=options.jobs, threads=options.threads)


def _export(options: argparse.Namespace) -> None:
    from .train.export import EXPORTS

    for name in options.only or EXPORTS:
        path = EXPORTS[name](options.runs)
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


def _check(options: argparse.Namespace) -> None:
    from .train.check import check

    for line in check(options.runs, options.out, options.pictures):
        print(line)


def _ablate(options: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(options.threads)
    from microworld import files

    from . import ablations, evidence

    chosen = {
        "core": ablations.CORE,
        "open": ablations.OPEN,
        "sweeps": ablations.SWEEPS,
        "all": tuple(ablations.ROWS.values()),
    }[options.rows]
    folder = options.runs / "ablations"
    if options.score:
        if options.rows == "sweeps":  # every curve has the full method's point
            chosen = (ablations.ROWS[evidence.FULL], *chosen)
        scores = ablations.score(folder, chosen, options.out / f"{options.rows}.csv")
        evidence.write(folder, scores)
        print(scores.with_suffix(".md").read_text(encoding="utf-8"))
        return
    adapters = {"identity": options.adapter or str(files.ADAPTER)}
    if options.entangled:
        adapters["entangled"] = options.entangled
    ablations.make(folder, chosen, adapters, options.part)


if __name__ == "__main__":
    main()
