"""The configuration names what is wrong with it."""

from __future__ import annotations

import re
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from infinite_id_core.errors import FileMissingError
from trainer.config import Previews, TrainConfig
from trainer.config_file import _ELSEWHERE, parse_config, read_config
from trainer.errors import ConfigSyntaxError, ConfigValueError, UnknownKeyError
from trainer.train.checks import check_device

SMALLEST: dict[str, dict[str, Any]] = {
    "run": {"output": "out", "steps": 10},
    "model": {"unet": "sdxl.safetensors"},
    "encoder": {"clip_model": "microworld"},
    "data": {"folder": "data"},
}
PAGE = Path(__file__).parents[3] / "docs" / "training.md"
EXAMPLES = sorted((Path(__file__).parents[3] / "trainer" / "configs").glob("*.toml"))


def parse(**sections: dict[str, Any]) -> Any:
    values = {**SMALLEST}
    for name, entries in sections.items():
        values[name] = {**values.get(name, {}), **entries}
    return parse_config(values, "x.toml")


def test_the_papers_values_are_the_defaults() -> None:
    config = parse()
    options = config.optimiser
    assert (options.rate, options.weight_decay, options.batch) == (1e-4, 0.01, 4)
    assert (options.schedule, config.objective.drop_identity) == ("fixed", 0.1)
    assert (config.objective.mode, config.adapter.face_tokens) == ("identity", 4)


def test_an_unknown_key_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownKeyError, match=r"x.toml: 'learning_rate'.*Did you mean 'rate'\?"):
        parse(optimiser={"learning_rate": 1e-4})
    with pytest.raises(UnknownKeyError, match="Known: mode, pooled, drop_identity"):
        parse(objective={"xyz": 1})
    with pytest.raises(UnknownKeyError, match=r"'acumulation' is no key of \[optimiser\].*'accum"):
        parse(optimiser={"acumulation": 2})
    with pytest.raises(UnknownKeyError, match=r"'optimizer' is no section. Did you mean 'optimis"):
        parse(optimizer={"rate": 1e-4})
    with pytest.raises(UnknownKeyError, match="'min_face_sise'.*'min_face_size'"):
        parse(filters={"min_face_sise": 1})


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("data", "batch_size", "optimiser.batch"),
        ("run", "lr", "optimiser.rate"),
        ("optimiser", "lr", "rate"),
        ("run", "learning_rate", "optimiser.rate"),
        ("model", "batch", "optimiser.batch"),
        ("optimiser", "batch_size", "batch"),
        ("optimiser", "max_train_steps", "run.steps"),
        ("optimiser", "drop_identity", "objective.drop_identity"),
        ("train", "", "run"),
    ],
)
def test_a_key_of_another_section_or_trainer_is_answered_with_its_place(
    section: str, key: str, meant: str
) -> None:
    with pytest.raises(UnknownKeyError, match=f"Did you mean '{re.escape(meant)}'\\?"):
        parse(**{section: {key: 1} if key else {}})


@pytest.mark.parametrize("name", list(_ELSEWHERE.values()))
def test_the_places_of_other_trainers_names_exist(name: str) -> None:
    section, key = name.split(".")
    assert key in {f.name for f in fields(typing.get_type_hints(TrainConfig)[section])}


def test_what_people_write_is_taken() -> None:
    assert parse(run={"steps": 1e5}).run.steps == 100_000
    assert type(parse(run={"steps": 1e5}).run.steps) is int
    assert parse(run={"device": "cuda"}).run.device == "cuda"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.cuda if device == "cuda" else torch.backends.mps
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(ConfigValueError, match=f"run.device is '{device}', .* finds no such"):
        check_device(device)
    monkeypatch.setattr(module, "is_available", lambda: True)
    assert check_device(device).type == device


@pytest.mark.parametrize(
    ("section", "entries", "message"),
    [
        ("run", {"steps": 0}, r"run.steps must lie in \[1, 1000000000\], got 0"),
        ("run", {"steps": "many"}, "run.steps must be a whole number, got 'many'"),
        ("run", {"steps": True}, "run.steps must be a whole number, got True"),
        ("run", {"device": "gpu"}, "one of auto, cpu, cuda, mps; got 'gpu'. Did you mean 'cuda'"),
        ("run", {"device": "cuda:1"}, "got 'cuda:1'. Did you mean 'cuda'"),
        ("run", {"steps": 1.5}, "run.steps must be a whole number, got 1.5"),
        ("run", {"steps": float("inf")}, "run.steps must be a whole number, got inf"),
        ("optimiser", {"precision": "float16"}, "Did you mean 'fp16'?"),
        ("optimiser", {"rate": -1.0}, r"optimiser.rate must lie in \[0.0, 1.0\]"),
        ("optimiser", {"rate": float("nan")}, "optimiser.rate must lie"),
        ("optimiser", {"precision": "bf61"}, "Did you mean 'bf16'?"),
        ("optimiser", {"warmup": 10}, "optimiser.warmup 10 is not below run.steps 10"),
        ("objective", {"drop_identity": 1.5}, r"objective.drop_identity must lie in \[0.0, 1.0\]"),
        ("data", {"resolution": 1000}, "divide data.resolution 1000"),
        ("data", {"min_face": 0.7}, "data.min_face 0.7 is above data.max_face 0.6"),
        ("data", {"folder": ""}, "data.folder must not be empty"),
        ("encoder", {"clip_model": "ViT-H-14"}, "encoder.clip_weights is empty"),
        ("previews", {"mixing": "mix"}, "Did you mean 'mixed'?"),
        ("filters", {"min_pair_cosine": 2.0}, r"min_pair_cosine must lie in \[-1, 1\]"),
        ("filters", {"licences": "cc0"}, "filters.licences must be a list"),
        ("log", {"trackers": ["wandbb"]}, "log.trackers: each must be .* Did you mean 'wandb'?"),
        ("log", {"trackers": "wandb"}, "log.trackers must be a list"),
        ("log", {"project": ""}, "log.project must not be empty"),
    ],
)
def test_a_bad_value_is_named(section: str, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigValueError, match=message):
        parse(**{section: entries})


def test_fp16_does_not_run_on_the_cpu() -> None:
    with pytest.raises(ConfigValueError, match="fp16.*CPU"):
        parse(run={"device": "cpu"}, optimiser={"precision": "fp16"})


def test_a_missing_section_names_its_keys() -> None:
    with pytest.raises(ConfigValueError, match=r"\[run\] needs output, steps"):
        parse_config({"model": {"unet": "x"}})


def write(path: Path) -> Path:
    path.write_text(
        '[run]\noutput = "out"\nsteps = 10\n[model]\nunet = "u"\n'
        '[encoder]\nclip_model = "microworld"\n[data]\nfolder = "d"\n',
        encoding="utf-8",
    )
    return path


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "x.toml")
    config = read_config(
        path,
        [
            "run.steps=20", "optimiser.rate=1e-5", "model.unet=other file.safetensors",
            'filters.licences=["cc0", "cc-by"]', 'log.trackers=[]', "optimiser.clip_norm=1",
        ],
    )  # fmt: skip
    assert config.run.steps == 20
    assert config.optimiser.rate == 1e-5
    assert config.optimiser.clip_norm == 1.0
    assert config.model.unet == "other file.safetensors"
    assert config.filters.licences == ("cc0", "cc-by")
    assert config.log.trackers == ()
    for text in ("steps=3", "run.steps", "run.=3"):
        with pytest.raises(ConfigSyntaxError, match="section.key=value"):
            read_config(path, [text])
    with pytest.raises(UnknownKeyError, match="'step'.*'steps'"):
        read_config(path, ["run.step=3"])


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError):
        read_config(tmp_path / "no.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("[run\n", encoding="utf-8")
    with pytest.raises(ConfigSyntaxError, match="bad.toml: is not TOML"):
        read_config(bad)


def test_configurations_survive_json() -> None:
    config = parse(filters={"licences": ["cc0"]})
    assert parse_config(config.to_json()) == config


def test_previews_without_prompts_show_the_identity_stream_alone() -> None:
    assert Previews().options.merge_text is False
    assert Previews(prompts="p.safetensors").options.merge_text is True


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_valid(path: Path) -> None:
    read_config(path)


def test_there_is_an_example_for_each_scale() -> None:
    assert {path.stem for path in EXAMPLES} >= {"tiny", "one_gpu_24gb", "one_node", "many_nodes"}


def test_the_page_names_keys_that_exist() -> None:
    sections = typing.get_type_hints(TrainConfig)
    known = {f"{name}.{f.name}" for name, cls in sections.items() for f in fields(cls)}
    named = re.findall(rf"\b(?:{'|'.join(sections)})\.[a-z_0-9]+", PAGE.read_text(encoding="utf-8"))
    assert len(set(named)) > 30
    files = {"adapter.safetensors", "model.safetensors"}
    assert set(named) - known == files


def test_the_pages_second_stage_is_a_valid_configuration() -> None:
    stage = PAGE.read_text(encoding="utf-8").split("### One GPU of 24 GB")[1].split("###")[0]
    changes = re.findall(r"--set ([a-z_]+\.[a-z_]+=\S+)", stage)
    config = read_config(next(p for p in EXAMPLES if p.stem == "one_gpu_24gb"), changes)
    assert (config.data.resolution, config.optimiser.rate) == (1024, 1e-5)
    assert config.adapter.start_from == "runs/sdxl_512/adapter.safetensors"
    assert config.optimiser.batch * config.optimiser.accumulation == 16
