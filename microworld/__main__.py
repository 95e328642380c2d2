"""The microworld's own commands.

python -m microworld sheet OUT.png            a contact sheet of people and styles
python -m microworld people FOLDER            photos of synthetic people, a folder each

How its models are trained and what they prove: ``python -m lab``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .portraits import STYLES


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m microworld",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="draw a contact sheet")
    sheet.add_argument("out", type=Path)
    people = commands.add_parser("people", help="draw photos of synthetic people, a folder each")
    people.add_argument("folder", type=Path)
    people.add_argument("--people", type=int, default=48)
    people.add_argument("--photos", type=int, default=6, help="of each person")
    people.add_argument("--size", type=int, default=256, help="pixels")
    people.add_argument("--held-out", action="store_true", help="people no training has seen")
    people.add_argument("--style", choices=STYLES, help="default: in all styles")
    options = parser.parse_args(arguments)
    {"sheet": _sheet, "people": _people}[options.command](options)


def _sheet(options: argparse.Namespace) -> None:
    from PIL import Image

    from .people import contact_sheet

    Image.fromarray(contact_sheet()).save(options.out)
    print(options.out)


def _people(options: argparse.Namespace) -> None:
    from .people import write_people

    print(
        write_people(
            options.folder, options.people, options.photos,
            size=options.size, held_out=options.held_out,
            style=STYLES.index(options.style) if options.style else None, progress=True,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
