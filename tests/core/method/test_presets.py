"""Style presets as editable text."""

from __future__ import annotations

import pytest

from infinite_id_core.errors import OptionError
from infinite_id_core.presets import STYLE_NAMES, TWELVE, choose_preset, parse_presets


def test_twelve_styles_each_with_both_texts() -> None:
    presets = parse_presets(TWELVE)
    assert len(presets) == 12 and tuple(presets) == STYLE_NAMES
    assert all(p.negative for p in presets.values())


def test_texts_meet_the_users() -> None:
    style = choose_preset("\nink = ink of {prompt}, wet | photo\n", "ink")
    assert style.apply(" a cat ", "dull") == ("ink of a cat, wet", "dull, photo")
    assert choose_preset("ink = {prompt}", "ink").apply("a cat") == ("a cat", "")


@pytest.mark.parametrize(
    "text", ["ink", "ink = no place", "= {prompt}", "ink = {prompt}\nink = {prompt}"]
)
def test_bad_lines_are_named(text: str) -> None:
    with pytest.raises(OptionError, match=f"line {text.count(chr(10)) + 1}"):
        parse_presets(text)


def test_missing_style_lists_the_others() -> None:
    with pytest.raises(OptionError, match="No style 'oil'.*ink"):
        choose_preset("ink = {prompt}", "oil")
