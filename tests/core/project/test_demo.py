"""The demo without ComfyUI: what it makes, how it reads the workflow, what it says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from microworld.captions import parse
from microworld.people import REFERENCES, reference_picture
from microworld.portraits import BACKGROUNDS, HELD_OUT_SEEDS, STYLES
from tools import demo
from tools.strip import GAP, HEIGHT, strip
from tools.without_comfyui import Diffusers, HostNeeded, to_api

ROOT = Path(__file__).resolve().parents[3]
PICTURE = "docs/images/demo.png"


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(demo.WORKFLOW.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def quick(graph: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's workflow with three steps."""
    changed = json.loads(json.dumps(graph))
    sampler = next(node for node in changed["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][2] = 3
    path = tmp_path_factory.mktemp("workflow") / "quick.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    return path


def options(**given: Any) -> Namespace:
    values = {"prompt": None, "style": None, "seed": None, "reference": None, "host": None}
    return Namespace(**{**values, "workflow": demo.WORKFLOW, **given})


def run_demo(*arguments: object, reason: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "INFINITE_ID_HOST_MISSING": reason}
    return subprocess.run(
        [sys.executable, "-m", "tools.demo", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


# -- what it makes ---------------------------------------------------------------------------------


def test_without_comfyui_a_strip_is_made_and_said(quick: Path, tmp_path: Path) -> None:
    done = run_demo("--workflow", quick, "--output", tmp_path, reason="Nowhere to be found.")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])
    assert path == tmp_path / "demo-1.png"
    told = [line for line in done.stderr.splitlines() if "Nowhere to be found." in line]
    assert len(told) == 1 and "diffusers" in told[0]
    made = np.asarray(Image.open(path).convert("RGB"))
    assert made.shape[1] == 5 * HEIGHT + 4 * GAP and made.shape[0] > HEIGHT
    first, *painted = (
        made[:HEIGHT, i * (HEIGHT + GAP) : i * (HEIGHT + GAP) + HEIGHT].astype(int)
        for i in range(5)
    )
    assert np.array_equal(first, reference_picture(size=HEIGHT))
    for number, picture in enumerate(painted):
        assert picture.std() > 5
        assert all(np.abs(picture - other).mean() > 1 for other in painted[:number])


def test_the_readmes_picture_is_what_the_demo_makes(tmp_path: Path) -> None:
    """But for rounding: it was made on another processor, and by ComfyUI."""
    made, shown = (
        np.asarray(Image.open(path).convert("RGB")).astype(int)[:HEIGHT]  # captions left out
        for path in (demo.make(Diffusers(), options(output=tmp_path)), ROOT / PICTURE)
    )
    assert made.shape == shown.shape
    for i in range(0, made.shape[1], HEIGHT + GAP):
        there, here = (p[:, i : i + HEIGHT] for p in (shown, made))
        assert np.abs(there - here).mean() < 1  # of 255


def test_one_prompt_makes_one_picture(quick: Path, tmp_path: Path) -> None:
    """And another seed another one, in the same process with the models kept."""
    host, made = Diffusers(), []
    for seed in (None, 7, 8):  # 7 is the workflow's
        given = options(prompt="a photo of a person", workflow=quick, seed=seed, output=tmp_path)
        made.append(np.asarray(Image.open(demo.make(host, given))).astype(int))
    assert made[0].shape == (128, 128, 3)
    assert np.array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2]).mean() > 1


def test_photo_without_a_face_is_refused(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "nobody.png"
    Image.new("RGB", (64, 64), "teal").save(photo)
    given = {"--workflow": quick, "--output": tmp_path / "out", "--reference": photo}
    words = [str(word) for pair in given.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["tools.demo", *words])
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)  # pytest's stay
    assert demo.main() == 1
    told = capsys.readouterr()
    assert "\nNoFaceError: " in told.err and told.out == ""
    assert not (tmp_path / "out").exists()


def test_unknown_style_is_named() -> None:
    with pytest.raises(demo.DemoError, match="--style cubism: expected one of photo, sketch"):
        demo.styled("", "", "cubism")


# -- reading the workflow --------------------------------------------------------------------------


def test_values_come_from_the_workflow(graph: dict[str, Any]) -> None:
    nodes = {node["class_type"]: node["inputs"] for node in to_api(graph).values()}
    sampler = nodes["KSampler"]
    stored = next(n["widgets_values"] for n in graph["nodes"] if n["type"] == "KSampler")
    names = ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise")
    assert {n: v for n, v in zip(names, stored, strict=True) if n} == {
        n: sampler[n] for n in names if n
    }
    assert nodes["EmptyLatentImage"] == {"width": 128, "height": 128, "batch_size": 1}
    assert nodes["InfiniteIDApply"]["style"] == "adain_mean"
    assert nodes["InfiniteIDApply"]["merge_text"] is True


def test_texts_follow_the_samplers_links(graph: dict[str, Any]) -> None:
    """Whichever text node stands first: what counts is where its link ends."""
    swapped = json.loads(json.dumps(graph))
    first, second = (n for n in swapped["nodes"] if n["type"] == "CLIPTextEncode")
    first["widgets_values"], second["widgets_values"] = ["sketch, rain"], ["a person"]
    sampler = next(n for n in swapped["nodes"] if n["type"] == "KSampler")
    ends = {socket["name"]: socket for socket in sampler["inputs"]}
    ends["positive"]["link"], ends["negative"]["link"] = (
        ends["negative"]["link"],
        ends["positive"]["link"],
    )
    prompt = to_api(swapped)
    assert demo.fill_in(prompt, "x.png", "a person", "sketch", 5) == "a sketch of a person"
    by_id = {key: node["inputs"] for key, node in prompt.items()}
    assert by_id[str(second["id"])]["text"] == "a sketch of a person"
    assert "rain" in by_id[str(first["id"])]["text"]
    assert by_id[str(sampler["id"])]["seed"] == 5


@pytest.mark.parametrize(
    ("name", "missing"), [("two_people", "SolidMask"), ("style_presets", "InfiniteIDStylePreset")]
)
def test_what_only_comfyui_can_is_named(name: str, missing: str) -> None:
    other = json.loads((ROOT / "workflows" / f"{name}.micro.json").read_text(encoding="utf-8"))
    with pytest.raises(HostNeeded, match=f"{missing} runs in ComfyUI only"):
        to_api(other)


def test_other_samplers_are_refused(graph: dict[str, Any]) -> None:
    prompt = to_api(graph)
    demo.fill_in(prompt, "made.png", "a person", None, None)
    sampler = next(n for n in prompt.values() if n["class_type"] == "KSampler")
    sampler["inputs"] |= {"sampler_name": "dpmpp_2m"}
    host = Diffusers()
    host.upload(demo.made_portrait(), "made.png")
    with pytest.raises(HostNeeded, match="ddim, euler.*dpmpp_2m"):
        host.run(prompt)


# -- what is asked for -----------------------------------------------------------------------------


def test_four_scenes_differ_and_are_in_the_captions_words() -> None:
    asked = demo.wanted(options())
    texts = [demo.styled(scene, "", style)[0] for scene, style in asked]
    read = [parse(text) for text in texts]
    assert [found["style"] for found in read] == [style for _, style in asked] == list(STYLES)
    assert len({found["background"] for found in read}) == 4
    assert len({found.get("accessory") for found in read}) == 4
    assert {found["expression"] for found in read} == {"smile", "surprise", "neutral"}
    shown = REFERENCES[0][1]
    assert shown in BACKGROUNDS and shown not in {found["background"] for found in read}


def test_style_alone_is_that_picture_of_the_four() -> None:
    assert demo.wanted(options(style="sepia")) == [demo.wanted(options())[2]]
    assert demo.wanted(options(prompt="x", style="neon")) == [("x", "neon")]


def test_negative_prompt_does_not_name_what_is_wanted() -> None:
    _, negative = demo.styled("a person", "sketch, sepia, neon, rain", "sketch")
    assert {"sepia", "neon", "rain"} <= set(negative.split(", "))
    assert "sketch" not in negative
    assert demo.styled("a neon picture", "sketch, neon", None)[1] == "sketch"


def test_references_are_two_people_nobody_has_trained_on() -> None:
    assert all(seed in HELD_OUT_SEEDS for seed, _ in REFERENCES)
    first, second = (reference_picture(n).astype(int) for n in (0, 1))
    assert first.shape == second.shape == (256, 256, 3)
    assert np.abs(first - second).mean() > 20


def test_strip_scales_to_one_height() -> None:
    made = strip([(Image.new("RGB", (20, 10)), ""), (Image.new("L", (7, 14), 255), "")], 50)
    assert made.size == (100 + GAP + 25, 50)
    captioned = strip([(Image.new("RGB", (100, 100)), "word " * 40)], 100)
    assert captioned.width == 100 and captioned.height > 200
    assert Image.open(io.BytesIO(demo.made_portrait())).size == (256, 256)
