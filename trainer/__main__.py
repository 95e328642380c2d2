"""``python -m trainer COMMAND ...``: each command's module is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Sequence

from infinite_id_core.errors import InfiniteIDError
from infinite_id_core.files.system import named

# Command -> module with main(argv) -> exit status, and what it is for.
COMMANDS = {
    "prepare": ("trainer.prepare.cli", "photos to training shards"),
    "train": ("trainer.train.cli", "training shards to an adapter"),
    "generate": ("trainer.generate", "pictures of a person, without ComfyUI"),
    "evaluate": ("trainer.evaluate", "likeness and prompt scores of pictures"),
    "inspect": ("trainer.inspect", "what a file holds, and whether it is sound"),
    "convert": ("trainer.convert", "a pickled adapter, identity or model to safetensors"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a named error is printed in one line and gives exit status 1."""
    listed = "\n".join(f"  {name:10}{purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Make the weights of Infinite-ID.",
        epilog=f"commands:\n{listed}\n\npython -m trainer COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    values = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold what no console can show
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"insightface\.")
    module = importlib.import_module(COMMANDS[values.command][0])
    try:
        status: int = module.main(values.arguments)
        return status
    except InfiniteIDError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of a file that nothing has named: an answer, not a traceback
        if error.errno is None or isinstance(error, BrokenPipeError):
            raise
        told = named(error)
        print(f"{type(told).__name__}: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
