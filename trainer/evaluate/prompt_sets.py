"""Prompt sets: text files with a category and a prompt on each line.

Three come with the project, in ``trainer/prompt_sets``. ``everyday`` (41) and ``scenes`` (40) are
in our own words and built as the sets of PhotoMaker and of FastComposer are; ``microworld`` is
made of the words its captions know.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from infinite_id_core.errors import FileError
from infinite_id_core.files.system import read_bytes

from ..errors import PromptSetError
from ..texts import decode_text

FOLDER = Path(__file__).resolve().parents[1] / "prompt_sets"
_LIMIT = 2**24  # bytes of a file
SUBJECT = "{person}"


@dataclass(frozen=True, kw_only=True)
class EvalPrompt:
    """One prompt and what kind of thing it asks for."""

    text: str
    category: str


def known_sets() -> list[str]:
    """Names of the sets that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def load_prompt_set(name: str, subject: str = "a person") -> tuple[EvalPrompt, ...]:
    """A set by its name, or a file of lines ``category | prompt``.

    ``{person}`` becomes ``subject``; empty lines and those with # are skipped. Raises
    ``PromptSetError``.
    """
    path = FOLDER / f"{name}.txt" if name in known_sets() else Path(name)
    try:
        lines = decode_text(read_bytes(path, _LIMIT)).splitlines()
    except (FileError, ValueError) as error:
        raise PromptSetError(
            name, f"is neither a set of this project ({', '.join(known_sets())}) nor a text file "
            f"that can be read ({error})."
        ) from error  # fmt: skip
    prompts = [
        _prompt(path, number, line, subject)
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not prompts:
        raise PromptSetError(path, "holds no prompt. Write lines 'category | prompt'.")
    counts = Counter(prompt.text for prompt in prompts)
    twice = sorted(text for text, count in counts.items() if count > 1)
    if twice:
        raise PromptSetError(path, f"has {len(twice)} prompts twice, such as {twice[0]!r}.")
    return tuple(prompts)


def _prompt(path: Path, number: int, line: str, subject: str) -> EvalPrompt:
    category, bar, text = (part.strip() for part in line.partition("|"))
    if not (category and bar and text):
        raise PromptSetError(
            path, f"line {number} is {line.strip()!r}; expected 'category | prompt'."
        )  # fmt: skip
    return EvalPrompt(text=text.replace(SUBJECT, subject), category=category)
