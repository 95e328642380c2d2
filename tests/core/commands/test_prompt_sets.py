"""The prompt sets that come with the project, and what a set of one's own must be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from microworld.captions import all_phrases, parse
from trainer.errors import PromptSetError
from trainer.evaluate.prompt_sets import FOLDER, SUBJECT, known_sets, load_prompt_set


def counts(name: str) -> dict[str, int]:
    return dict(Counter(prompt.category for prompt in load_prompt_set(name)))


def test_the_sets_have_the_structure_of_the_fields():
    assert known_sets() == ["everyday", "microworld", "scenes"]
    everyday = counts("everyday")
    assert sum(everyday.values()) == 41
    kinds = ["clothing", "accessory", "action", "expression", "view", "background"]
    assert list(everyday) == kinds and min(everyday.values()) >= 5
    assert counts("scenes") == dict.fromkeys(["accessory", "style", "action", "context"], 10)


@pytest.mark.parametrize("name", ["everyday", "scenes", "microworld"])
def test_every_prompt_names_the_person_once(name):
    for prompt in load_prompt_set(name, "SOMEBODY"):
        assert prompt.text.count("SOMEBODY") == 1 and SUBJECT not in prompt.text


def test_the_microworld_knows_every_word_of_its_set():
    words = {word for phrase in all_phrases() for word in phrase.split()}
    prompts = load_prompt_set("microworld")
    assert {word for prompt in prompts for word in prompt.text.split()} <= words
    for prompt in prompts:
        named = parse(prompt.text)
        assert {"style", "background", "expression"} <= named.keys()
        if prompt.category in ("style", "accessory"):
            assert named[prompt.category] not in ("photo", "none")
    shown = {prompt.category: parse(prompt.text) for prompt in prompts}
    assert shown.keys() == {"background", "expression", "accessory", "style", "unseen combination"}


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# a comment\n\nhat | {person} | in a hat\nplain | a house\n", encoding="utf-8")
    prompts = load_prompt_set(str(path), "a woman")
    assert [(p.category, p.text) for p in prompts] == [
        ("hat", "a woman | in a hat"),
        ("plain", "a house"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("# only this\n", "holds no prompt"),
        ("hat | a hat\na person in a hat\n", "line 2 is 'a person in a hat'"),
        ("hat |\n", "line 1"),
        ("a | same\nb | same\n", "twice, such as 'same'"),
    ],
)
def test_what_is_no_prompt_set(tmp_path, text, message):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PromptSetError, match=message) as caught:
        load_prompt_set(str(path))
    assert caught.value.path == path


def test_an_unknown_set_lists_the_known_ones():
    with pytest.raises(PromptSetError, match="everyday, microworld, scenes"):
        load_prompt_set("nobody's")


def test_the_sets_lie_in_the_clone():
    assert Path(__file__).resolve().parents[3] / "trainer" / "prompt_sets" == FOLDER
