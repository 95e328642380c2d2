"""``python -m trainer train --config x.toml``: training shards to an adapter.

Runs by itself, under ``torchrun -m trainer train ...`` and ``accelerate launch -m trainer
train ...`` alike.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ..config_file import read_config


def main(argv: Sequence[str]) -> int:
    """Train, or with ``--dry-run`` check everything and estimate. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", required=True, help="TOML file; see docs/training.md")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one entry of the file; may be given several times",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|none",
        help="start from the newest checkpoint of run.output (auto), a given one, or none",
    )
    parser.add_argument(
        "--resume-changed",
        action="store_true",
        help="go on from a checkpoint of other settings (rate, batch, filters, number of GPUs), "
        "with its optimiser's state; what changed is shown and recorded",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check configuration, data and files, estimate memory, disk and time, and end",
    )
    parser.add_argument(
        "--fill-caches",
        action="store_true",
        help="compute the latents and features that are cached, and end",
    )
    values = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    config = read_config(values.config, values.set)
    if values.dry_run:
        from .estimate import dry_run

        print(dry_run(config, values.resume, values.resume_changed))
        return 0
    from .filling import fill_caches
    from .loop import INTERRUPTED, train

    if values.fill_caches:
        return 0 if fill_caches(config) else INTERRUPTED
    outcome = train(config, values.resume, changed=values.resume_changed)
    if not outcome.finished:
        print(
            f"Stopped and saved at step {outcome.step}. The same command goes on from there.",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(outcome.adapter)
    return 0
