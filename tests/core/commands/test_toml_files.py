"""Configurations as people's editors and systems write them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from infinite_id_core.errors import FileError, FileMissingError
from trainer.config_file import read_config
from trainer.errors import ConfigSyntaxError, ManifestError
from trainer.evaluate.manifest import read_manifest
from trainer.evaluate.prompt_sets import load_prompt_set
from trainer.toml_files import parse_toml, read_toml

ROOT = Path(__file__).resolve().parents[3]
TEXT = "[run]\r\noutput = 'für/é'\r\nsteps = 3\r\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]
)
def test_a_configuration_is_read_in_any_encoding(tmp_path, encoding):
    path = tmp_path / "c.toml"
    path.write_bytes(TEXT.encode(encoding))
    assert read_toml(path) == {"run": {"output": "für/é", "steps": 3}}


def test_the_shipped_configuration_with_a_mark_is_the_same(tmp_path):
    shipped = ROOT / "trainer" / "configs" / "tiny.toml"
    copy = tmp_path / "tiny.toml"
    copy.write_bytes(b"\xef\xbb\xbf" + shipped.read_bytes())
    assert read_config(copy) == read_config(shipped)
    copy.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-16")
    assert read_config(copy) == read_config(shipped)


def test_text_in_no_encoding_that_can_be_told_is_named(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes("[run]\noutput = 'папка'".encode("cp1251"))
    with pytest.raises(ConfigSyntaxError, match="UTF-8"):
        read_toml(path)
    with pytest.raises(FileMissingError):
        read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "written",
    [
        r"C:\Users\me\photos",  # no escape
        r"C:\data",
        r"D:\xdata",
        r"C:\temp\new",  # escapes that stand for a tab and a line's end
        r"C:\new",
        r"photos\train",
        r"C:\\good\bad",
        r"\\server\share",
    ],
)
def test_windows_paths_say_what_to_write_instead(written):
    plain = written.replace("\\\\", "\\")
    text = f'[model]\nvae = ""\nunet = "{written}"  # a path\n'
    with pytest.raises(ConfigSyntaxError) as caught:
        parse_toml(text, "c.toml")
    assert f"'{plain}'" in str(caught.value)
    assert f'"{plain.replace(chr(92), "/")}"' in str(caught.value)
    assert parse_toml(f"unet = '{plain}'", "c.toml") == {"unet": plain}


def test_a_path_that_became_two_lines_says_what_to_write_instead():
    with pytest.raises(ConfigSyntaxError, match=r"'data\\new'"):
        parse_toml('folder = "data\\new"', "x.toml")
    assert parse_toml('note = """two lines\nof text"""', "x.toml") == {"note": "two lines\nof text"}


def test_no_path_holds_nul():
    with pytest.raises(ConfigSyntaxError, match="sign that no path has"):
        parse_toml('folder = "a\\u0000b"', "x.toml")


def test_manifests_and_prompts_that_mean_harm_end_by_name_and_at_once(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("[" * 50_000, encoding="utf-8")
    with pytest.raises(ManifestError, match="no JSON"):
        read_manifest(path)
    path = tmp_path / "m.csv"
    path.write_text("x" * 200_000 + ",image\n1,2\n", encoding="utf-8")
    with pytest.raises(ManifestError, match="no CSV"):
        read_manifest(path)
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a | prompt {n}\n" for n in range(100_000)), encoding="utf-8")
    started = time.process_time()
    assert len(load_prompt_set(str(path))) == 100_000
    assert time.process_time() - started < 20


@pytest.mark.parametrize("read", [read_toml, read_manifest, load_prompt_set])
def test_a_text_file_of_gigabytes_is_not_read(read, tmp_path):
    path = tmp_path / "large.csv"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(FileError, match="has 8589934592 bytes"):
        read(path)


def test_paths_written_rightly_and_other_mistakes_are_left_alone():
    right = {"a": r"C:\Users\me", "b": "C:/Users/me", "c": "two lines\nof text"}
    text = r"""
# not "C:\Users"
a = "C:\\Users\\me"
b = "C:/Users/me"
c = "two lines\nof text"
"""
    assert parse_toml(text, "c.toml") == right
    with pytest.raises(ConfigSyntaxError) as caught:
        parse_toml(text + "steps = = 3", "c.toml")
    assert "Windows" not in str(caught.value)
    with pytest.raises(ConfigSyntaxError, match="nested|not TOML"):
        parse_toml("a = " + "[" * 100_000, "c.toml")


def test_a_windows_path_on_the_command_line_is_taken_as_it_is():
    tiny = ROOT / "trainer" / "configs" / "tiny.toml"
    for written in (r"C:\temp\new", r'"C:\temp\new"', r"'C:\temp\new'"):
        assert read_config(tiny, [f"run.output={written}"]).run.output == r"C:\temp\new"
