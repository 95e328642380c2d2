"""``trainer evaluate``: manifests, methods, scores by hand, reports, and whole runs."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infinite_id_core import errors
from infinite_id_core.files.cells import csv_cell, from_csv_cell
from infinite_id_core.scores.metrics import BootstrapOptions
from infinite_id_core.scores.score import PackReader, ReadFace
from microworld import files
from microworld.portraits import HELD_OUT_SEEDS, Attributes, Nuisance, render
from microworld.portraits import Identity as Person
from trainer.errors import (
    ManifestError,
    MethodError,
    MissingPicturesError,
    NoPicturesError,
    ReferencePhotoError,
    UnknownBackboneError,
    UnreadableError,
)
from trainer.evaluate import backbones, cli, figures, main, people, pictures
from trainer.evaluate.manifest import COLUMNS, Row, check_files, read_manifest, write_manifest
from trainer.evaluate.measure import measure
from trainer.evaluate.methods import Method, parse_method
from trainer.evaluate.prompt_sets import EvalPrompt
from trainer.evaluate.summary import cell, markdown, summarise, write_pictures, write_summary
from trainer.painter import Sources
from trainer.photos import read_reference

# --- manifests -----------------------------------------------------------------------------------


def as_csv(path: Path, *records: dict[str, str], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
    return path


def record(**changes: str) -> dict[str, str]:
    return {
        "image": "a.png", "reference": "ref.png", "identity": "ann", "prompt": "ann, laughing",
        "seed": "1", "method": "theirs",
    } | changes  # fmt: skip


def test_csv_and_json_lines_say_the_same(tmp_path):
    records = [record(), record(image="b.png", prompt="", seed="")]
    by_csv = read_manifest(as_csv(tmp_path / "m.csv", *records))
    lines = tmp_path / "m.jsonl"
    plain = [{**r, "seed": int(r["seed"]) if r["seed"] else None, "more": 1} for r in records]
    lines.write_text("\n\n".join(map(json.dumps, plain)), encoding="utf-8")
    assert read_manifest(lines) == by_csv
    assert by_csv[0] == Row(
        image=tmp_path / "a.png", reference=tmp_path / "ref.png", identity="ann",
        prompt="ann, laughing", seed="1", method="theirs",
    )  # fmt: skip


def test_a_written_manifest_is_read_back_and_may_be_moved(tmp_path):
    row = Row(image=tmp_path / "p" / "a.png", reference=Path("/elsewhere/r.png"), identity="a,b",
              prompt='"quoted"', seed="0", method="m", category="view")  # fmt: skip
    write_manifest(tmp_path / "m.csv", [row])
    assert read_manifest(tmp_path / "m.csv") == [row]
    assert (
        "p/a.png" in (tmp_path / "m.csv").read_text()
        and str(tmp_path) not in (tmp_path / "m.csv").read_text()
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "image,prompt,seed\na.png,x,1\n", "lacks reference, identity, method; found ima"),
        ("m.csv", "", "lacks image.*found none"),
        ("m.csv", ",".join(COLUMNS) + "\n", "names no picture"),
        ("m.csv", ",".join(COLUMNS) + "\na.png,,ann,x,1,\n", "line 2 has no reference and no met"),
        ("m.jsonl", '{"image": "a.png"}', "line 1 lacks reference, identity"),
        ("m.jsonl", "image\n", "line 1 is no JSON"),
        ("m.jsonl", "[1]\n", "line 1 is no JSON object"),
    ],
)
def test_what_is_no_manifest(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / name)


def test_a_manifest_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(errors.FileMissingError):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "m.csv").write_bytes("картинка".encode("cp1251"))
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(tmp_path / "m.csv")


def test_missing_files_are_counted_and_listed(tmp_path):
    (tmp_path / "ref.png").write_bytes(b"")
    path = as_csv(tmp_path / "m.csv", *(record(image=f"{i}.png") for i in range(7)))
    with pytest.raises(MissingPicturesError, match="7 of 8 files.*0.png;.*and 2 more"):
        check_files(path, read_manifest(path))


# --- methods and seeds ---------------------------------------------------------------------------


def test_a_method_says_how_it_differs():
    base = Method(name="base", adapter="a.safetensors", steps=20)
    method = parse_method("mutual 0.5: mixing=mutual, strength=0.5,merge_text=off", base)
    assert (method.name, method.adapter, method.steps) == ("mutual 0.5", "a.safetensors", 20)
    options = method.options()
    assert (options.mixing, options.merge_text, method.strength) == ("mutual", False, 0.5)
    assert parse_method("other", base).settings() == base.settings()
    passed = parse_method("x:negative_identity=none,negative_mixing=off", base).negative_pass()
    assert (passed.identity, passed.mixing) == ("none", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:strange=1", "Keys: adapter, strength"),
        ("x:mixing", "expected NAME or NAME:key=value"),
        ("x:strength=much", "strength is 'much'; expected float"),
        ("x:merge_text=maybe", "expected on, off"),
        ("x:mixing=both", "mixing"),
        ("x:negative_identity=some", "identity must be one of"),
        ("x:steps=0", "steps must lie in"),
        ("x:strength=9", "strength must lie in"),
        ("../x", "name becomes a folder"),
        (":steps=3", "name becomes a folder"),
    ],
)
def test_what_is_no_method(text, message):
    with pytest.raises(MethodError, match=message):
        parse_method(text, Method(name="base"))


def test_seeds():
    assert cli.seeds("0-2, 7,1") == [0, 1, 2, 7]
    for text in ("", "a", "3-1", "0-99999"):
        with pytest.raises(errors.OptionError, match="Seeds are numbers"):
            cli.seeds(text)


# --- scores by hand ------------------------------------------------------------------------------


class MadeReader:
    """An angle off the picture's mean red, a crop of its green; a black one is nobody."""

    name = "made/reader"

    def read(self, picture: torch.Tensor) -> ReadFace | None:
        red, green, _ = picture.mean((0, 1)).tolist()
        if red == 0.0:
            return None
        angle = torch.tensor(red * math.pi)
        embedding = torch.stack([angle.cos(), angle.sin()])
        return ReadFace(embedding=embedding, crop=torch.full((16, 16, 3), green))


class MadeVision:
    """An angle of the mean blue of a picture or grey of a crop; all texts at angle 0."""

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Any:
        angle = image[..., 2].mean((1, 2)) * math.pi
        return type("Output", (), {"image_embeds": torch.stack([angle.cos(), angle.sin()], 1)})()

    def read_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]] * len(texts))


def paint(path: Path, red: int, green: int = 0, blue: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (red, green, blue)).save(path)
    return path


def turn(a: int, b: int) -> float:
    """Cosine between the angles of two 8-bit values."""
    return math.cos((a - b) / 255 * math.pi)


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    """Two people, two methods; one picture without a face, one that is no picture."""
    references = {
        "ann": paint(tmp_path / "refs/ann/0.png", 100, 100),
        "bob": paint(tmp_path / "refs/bob.png", 200, 100),
    }
    paint(tmp_path / "refs/ann/1.png", 130, 100)
    made = [
        ("good", "ann", paint(tmp_path / "g0.png", 100, 100, 50), "hat"),
        ("good", "bob", paint(tmp_path / "g1.png", 190, 120, 50), "hat"),
        ("good", "bob", paint(tmp_path / "g2.png", 0, 0, 25), "view"),
        ("bad", "ann", paint(tmp_path / "b0.png", 50, 40, 100), "hat"),
        ("bad", "bob", tmp_path / "b1.png", "hat"),
    ]
    made[-1][2].write_bytes(b"no picture")
    return [
        Row(image=image, reference=references[who], identity=who, prompt=f"{who} {kind}",
            method=method, category=kind)
        for method, who, image, kind in made
    ]  # fmt: skip


def test_every_score_by_hand(rows, tmp_path):
    known = people.read_people(tmp_path / "refs")
    found = measure(rows, MadeReader(), MadeVision(), known)
    assert found.status[:4] == ("ok", "ok", "no face", "ok")
    assert found.status[4].startswith("not_an_image")
    face = [1.0, turn(190, 200), math.nan, turn(50, 100), math.nan]
    assert found.m_face == pytest.approx(face, abs=1e-5, nan_ok=True)
    crops = [1.0, turn(120, 100), math.nan, turn(40, 100), math.nan]
    assert found.clip_i == pytest.approx(crops, abs=1e-5, nan_ok=True)
    prompts = [turn(50, 0), turn(50, 0), turn(25, 0), turn(100, 0), math.nan]
    assert found.clip_t == pytest.approx(prompts, abs=1e-5, nan_ok=True)
    # Ann's other photo is at 130: a copy of the reference is 1, one on the far side -1.
    assert found.copy_paste[[0, 3]] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert np.isnan(found.copy_paste[[1, 2, 4]]).all()
    population = found.populations["m_face"]
    assert population.count == 3 and "of all methods of this run" in population.over
    measured = np.array(face)[[0, 1, 3]]
    z = (measured - measured.mean()) / measured.std()
    c = np.array(crops)[[0, 1, 3]]
    assert found.fidelity[[0, 1, 3]] == pytest.approx((z + (c - c.mean()) / c.std()) / 2, abs=1e-4)


def test_the_summary_of_a_method(rows):
    found = measure(rows, MadeReader(), MadeVision())
    good, bad = summarise(found, BootstrapOptions(resamples=200)).methods
    assert (good.method, good.pictures, good.unreadable) == ("good", 3, 0)
    assert (bad.pictures, bad.unreadable) == (1, 1)
    assert good.detected.mean == pytest.approx(2 / 3)
    own = (1.0 + turn(190, 200)) / 2
    assert good.m_face.mean == pytest.approx(own, abs=1e-5)
    assert good.m_face_filled.mean == pytest.approx(own * 2 / 3, abs=1e-5)
    assert (good.m_face.by, good.m_face.units, good.m_face.count) == ("identity", 2, 2)
    assert (good.m_face_filled.low, good.m_face_filled.high) == pytest.approx(
        (turn(190, 200) / 2, 1.0), abs=1e-5
    )
    kinds = summarise(found).categories
    assert list(kinds) == ["hat", "view"] and kinds["view"][0].detected.mean == 0.0


def test_without_clip_only_faces_are_scored(rows):
    found = measure(rows, MadeReader(), None)
    assert found.m_face[0] == pytest.approx(1.0) and not found.populations
    assert all(np.isnan(s).all() for s in (found.clip_i, found.clip_t, found.fidelity))
    text = markdown(found, summarise(found), {})
    assert "M_face" in text and "CLIP-I" not in text and "Eq. 10" not in text


def test_nobody_anywhere_is_a_detection_rate_of_0(tmp_path):
    row = Row(image=paint(tmp_path / "a.png", 0), reference=paint(tmp_path / "r.png", 9),
              identity="a", prompt="x", method="m")  # fmt: skip
    found = measure([row], MadeReader(), MadeVision())
    (method,) = summarise(found).methods
    assert method.detected.mean == 0.0 and method.m_face_filled.mean == 0.0
    assert math.isnan(method.m_face.mean) and not found.populations


def test_references_and_pictures_that_cannot_be_used(rows, tmp_path):
    paint(rows[0].reference, 0)
    with pytest.raises(errors.NoFaceError, match="0.png: no face was found in this reference"):
        measure(rows, MadeReader(), None)
    rows[0].reference.write_bytes(b"")
    with pytest.raises(ReferencePhotoError, match="empty"):
        measure(rows, MadeReader(), None)
    with pytest.raises(NoPicturesError, match="None of the 1 pictures.*not_an_image"):
        measure(rows[4:], MadeReader(), None)


def test_a_folder_of_references_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "anna").mkdir()
    listed = Path.iterdir

    def refused(self):
        if self.name == "anna":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UnreadableError, match="anna.*Permission denied"):
        people.read_people(tmp_path)


def test_a_broken_picture_is_told_without_its_folder(tmp_path):
    with pytest.raises(ReferencePhotoError) as caught:
        read_reference(tmp_path / "gone.png")
    assert caught.value.problem.count(str(tmp_path)) == 0 and "unreadable" in str(caught.value)


# --- reports -------------------------------------------------------------------------------------


def test_the_files_hold_the_scores(rows, tmp_path):
    found = measure(rows, MadeReader(), MadeVision())
    summary = summarise(found)
    write_pictures(tmp_path / "pictures.csv", found)
    with (tmp_path / "pictures.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines[:3]] == ["ok", "ok", "no face"]
    assert float(lines[1]["m_face"]) == pytest.approx(turn(190, 200), abs=1e-5)
    assert lines[2]["m_face"] == "" and lines[0]["category"] == "hat"
    write_summary(tmp_path, found, summary, {"clip": "made"})
    content = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert content["methods"][0]["m_face"]["mean"] == pytest.approx(float(found.m_face[:2].mean()))
    assert content["populations"]["clip_i"]["count"] == 3
    assert [Path(path).name for path in content["unreadable"]] == ["b1.png"]
    page = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert f"| good | 3 | {cell(summary.methods[0].detected)} |" in page
    assert "## Unreadable: 1" in page


def test_texts_of_others_are_neither_formulas_nor_markup_and_folders_stay_private(rows, tmp_path):
    hostile = '=HYPERLINK("http://x")|<script>*b*\n# head'
    mine = [replace(row, method=hostile, prompt="+1 cat", seed="-7") for row in rows[:2]]
    bad = replace(rows[4], category="@cmd|x")
    found = measure([*mine, bad], MadeReader(), None)
    folder = tmp_path / "out"
    write_pictures(folder / "pictures.csv", found)
    with (folder / "pictures.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["method"] == "'" + hostile
    assert (lines[0]["prompt"], lines[0]["seed"]) == ("'+1 cat", "-7")
    assert lines[2]["category"] == "'@cmd|x"
    settings = {
        "adapter": str(tmp_path / "a.safetensors"),
        "method": [f"m:adapter={tmp_path / 'b.safetensors'},strength=1", "c:adapter=C:\\me\\x.bin"],
        "output": str(tmp_path),
        "prompts": ["and/or"],
        "clip": f"ViT-H-14={tmp_path / 'v|`.safetensors'}",
    }
    write_summary(folder, found, summarise(found), settings)
    shown = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["settings"]
    assert shown["adapter"] == "a.safetensors" and shown["prompts"] == ["and/or"]
    assert shown["method"] == ["m:adapter=b.safetensors,strength=1", "c:adapter=x.bin"]
    page = (folder / "summary.md").read_text(encoding="utf-8")
    assert "<script" not in page and "\n# head" not in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert any("HYPERLINK" in line for line in tables)
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables[:3]}
    assert len(columns) == 1  # a bar in a name makes no column
    for name in ("pictures.csv", "summary.json", "summary.md"):
        assert str(tmp_path) not in (folder / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["=1+1", "'=1", "''@x", "-7", "'quoted'", "+cat", "\tx", "＝1", ""]
)
def test_quoted_cells_come_back_as_they_were(text):
    assert from_csv_cell(csv_cell(text)) == text
    assert not csv_cell(text).startswith(("=", "+", "@", "\t", "\uff1d"))


def test_a_manifest_with_formulas_and_in_utf_16_is_read_back(tmp_path):
    places = {"image": tmp_path / "a.png", "reference": tmp_path / "-b.png"}
    row = Row(**places, identity="=x", prompt="-é 'x'", seed="-1", method="@m")
    path = tmp_path / "m.csv"
    write_manifest(path, [row])
    assert "'=x" in path.read_text(encoding="utf-8")
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16"))  # as a spreadsheet saves it
    assert read_manifest(path) == [row]


def test_the_contact_sheet_has_reference_first_people_in_rows_prompts_in_columns(rows):
    options = figures.SheetOptions(side=32, people=2, prompts=3)
    sheet = figures.contact_sheet([row for row in rows if row.method == "good"], options)
    step, line = 36, 12
    top = sheet.height - 2 * (step + line)
    assert sheet.width == 4 + step * 4  # the reference and three prompts

    def at(column: int, row: int) -> Any:
        return sheet.getpixel((4 + step * column + 16, top + (step + line) * row + 16))

    assert at(0, 0) == (100, 100, 0) and at(0, 1) == (200, 100, 0)
    assert at(1, 0) == (100, 100, 50) and at(2, 1) == (190, 120, 50)
    assert at(2, 0) == (225, 225, 225)  # Ann has no picture of Bob's prompt


def test_the_scatter_has_a_point_a_method(rows, tmp_path):
    summary = summarise(measure(rows, MadeReader(), MadeVision()))
    assert figures.scatter(tmp_path / "scatter.png", summary.methods)
    assert Image.open(tmp_path / "scatter.png").size == (840, 600)
    faces_only = summarise(measure(rows, MadeReader(), None))
    assert not figures.scatter(tmp_path / "none.png", faces_only.methods)
    assert not (tmp_path / "none.png").exists()


# --- backbones -----------------------------------------------------------------------------------


def portrait(seed: int, number: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, number])
    return render(Person.from_seed(seed), Attributes.sample(rng), Nuisance.sample(rng))


def test_an_onnx_recogniser_agrees_with_insightfaces_own_reading():
    reader = backbones.face_reader(str(files.RECOGNISER), str(files.FACE_MODELS))
    pack = backbones.face_reader(str(files.FACE_MODELS))
    assert isinstance(reader, backbones.OnnxReader) and isinstance(pack, PackReader)
    assert reader.name == pack.name == "microworld/rec" and reader.side == 112
    picture = torch.from_numpy(portrait(HELD_OUT_SEEDS[0])).float() / 255
    ours, theirs = reader.read(picture), pack.read(picture)
    assert ours is not None and theirs is not None
    cosine = torch.cosine_similarity(ours.embedding, theirs.embedding, dim=0)
    assert cosine > 0.999  # the crops are resampled differently
    assert float((ours.crop - theirs.crop).abs().max()) < 1e-3  # each by its own detector session
    assert reader.read(torch.zeros(128, 128, 3)) is None
    swapped = backbones.face_reader(
        str(files.RECOGNISER), str(files.FACE_MODELS), backbones.OnnxInput(order="bgr")
    ).read(picture)
    assert swapped is not None
    apart = (swapped.embedding - ours.embedding).norm() / ours.embedding.norm()
    assert apart > 1e-3  # the face is nearly grey


def test_the_microworlds_scorer_is_the_one_of_its_scoring():
    assert backbones.face_reader("microworld").name == "weights/scorer"


def test_unknown_backbones(tmp_path):
    with pytest.raises(errors.FaceModelError, match="ROOT/models/PACK"):
        backbones.face_reader("facenet")
    with pytest.raises(UnknownBackboneError, match="MODEL=FILE"):
        backbones.clip_model("ViT-H-14")
    with pytest.raises(errors.EncoderError, match="no model 'ViT-Z'"):
        backbones.clip_model(f"ViT-Z={tmp_path}/x.safetensors")
    with pytest.raises(errors.FileMissingError):
        backbones.face_reader(str(tmp_path / "none.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(errors.FaceModelError, match="cannot be loaded"):
        backbones.face_reader(str(tmp_path / "bad.onnx"))
    with pytest.raises(errors.FaceModelError, match="reads pictures"):
        backbones.OnnxReader(made_onnx(tmp_path / "flat.onnx"), None)
    assert backbones.clip_model("none") is None


def made_onnx(path: Path) -> Path:
    """A model that reads rows of numbers."""
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


# --- people --------------------------------------------------------------------------------------


def test_people_are_folders_or_single_photos(tmp_path):
    paint(tmp_path / "ann/2.png", 1)
    paint(tmp_path / "ann/1.jpg", 1)
    paint(tmp_path / "bob.png", 1)
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "empty").mkdir()
    found = {
        person.name: [p.name for p in person.photos] for person in people.read_people(tmp_path)
    }
    assert found == {"ann": ["1.jpg", "2.png"], "bob": ["bob.png"]}
    with pytest.raises(NoPicturesError, match="holds no photo"):
        people.read_people(tmp_path / "empty")
    with pytest.raises(errors.FileMissingError):
        people.read_people(tmp_path / "nowhere")


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    for seed in HELD_OUT_SEEDS[:2]:
        for number in range(2):
            path = folder / f"person {seed}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(portrait(seed, number)).save(path)
    return folder


def test_another_methods_folder_is_scored_from_its_manifest(references, tmp_path, capsys):
    """Here the pictures are the people's other photos: a method that is nearly perfect."""
    records = [
        record(
            image=str(folder / "1.png"), reference=str(folder / "0.png"), identity=folder.name,
            prompt="a photo of a person", method="their photos",
        )
        for folder in sorted(references.iterdir())
    ]  # fmt: skip
    manifest = as_csv(tmp_path / "m.csv", *records)
    assert main([str(tmp_path / "out"), "--manifest", str(manifest)]) == 0
    assert "| their photos | 2 | 1.000 [1.000, 1.000] |" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"pictures.csv", "summary.json", "summary.md", "scatter.png"}
    assert any(name.startswith("contact_their-photos") for name in names)


ARGUMENTS = [
    *("--method", "plain", "--method", "strong:guidance=1,steps=2", "--prompts", "microworld"),
    *("--size", "64", "--steps", "1", "--batch", "8", "--clip", "none"),
]


@pytest.fixture
def same_models(monkeypatch) -> None:
    """The embedded weights may be trained anew meanwhile; that would rightly make new pictures."""
    monkeypatch.setattr(pictures, "_print_of", lambda source: source)


def test_pictures_are_made_once(references, tmp_path, monkeypatch, capsys, same_models):
    short = tmp_path / "short.txt"
    short.write_text("a | a photo of {person}\nb | a sketch of {person}\n", encoding="utf-8")
    arguments = [str(tmp_path / "out"), "--references", str(references), *ARGUMENTS]
    arguments[arguments.index("microworld")] = str(short)
    assert main(arguments) == 0
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/pictures").rglob("*.png")}
    assert len(made) == 2 * 2 * 2  # methods, people, prompts
    rows = read_manifest(tmp_path / "out/manifest.csv")
    assert {row.image.resolve() for row in rows} == {path.resolve() for path in made}
    assert {row.method for row in rows} == {"plain", "strong"}

    gone = sorted(made)[3]
    gone.unlink()
    painted = []
    whole = pictures._Pictures.of
    monkeypatch.setattr(
        pictures._Pictures, "of", lambda self, tasks: painted.append(tasks) or whole(self, tasks)
    )
    assert main(arguments) == 0
    assert [task.path.name for tasks in painted for task in tasks] == [gone.name]
    again = {p: p.stat().st_mtime_ns for p in made}
    assert {p for p in made if made[p] != again[p]} == {gone}
    assert "| strong |" in capsys.readouterr().out


def plan_of(tmp_path: Path, references: Path, **changes: Any) -> set[str]:
    studio = pictures.Setting(sources=Sources(unet="microworld"), width=64, height=64)
    values: dict[str, Any] = {
        "method": Method(name="m"), "seeds": [0], "text": "a photo", "studio": studio
    } | changes  # fmt: skip
    tasks = pictures.plan(
        tmp_path, values["studio"], [values["method"]], people.read_people(references),
        [EvalPrompt(text=values["text"], category="")], values["seeds"],
    )  # fmt: skip
    return {str(task.path) for task in tasks}


def test_a_models_print_changes_with_its_files(tmp_path):
    (tmp_path / "pack").mkdir()
    for source in (tmp_path / "a.safetensors", tmp_path / "pack"):
        file = source if source.suffix else source / "det.onnx"
        file.write_bytes(b"one")
        before = pictures._print_of(str(source))
        assert before == pictures._print_of(str(source)) != str(source)
        file.write_bytes(b"two")
        assert pictures._print_of(str(source)) != before
    assert pictures._print_of("") == "" and pictures._print_of("none there") == "none there"


def test_a_pictures_name_depends_on_everything_that_it_depends_on(
    tmp_path, references, same_models
):
    base = plan_of(tmp_path, references)
    assert len(base) == 2 and base == plan_of(tmp_path, references)
    larger = pictures.Setting(sources=Sources(unet="microworld"), width=128, height=64)
    for change in (
        {"seeds": [1]}, {"text": "another photo"}, {"studio": larger},
        {"method": Method(name="m", strength=0.5)}, {"method": Method(name="m", references=2)},
        {"method": Method(name="m", negative="blurred")},
    ):  # fmt: skip
        assert not base & plan_of(tmp_path, references, **change), change


def test_what_a_run_refuses(references, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(errors.OptionError, match="Nothing to evaluate"):
        main([out])
    with pytest.raises(errors.OptionError, match="give --references"):
        main([out, "--method", "plain"])
    with pytest.raises(errors.OptionError, match="Give --prompts: one of everyday"):
        main([out, "--method", "plain", "--references", str(references)])
    with pytest.raises(errors.OptionError, match="a name of its own"):
        main([out, *ARGUMENTS, "--method", "plain", "--references", str(references)])
