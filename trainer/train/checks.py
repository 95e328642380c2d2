"""What a run needs, looked at before anything long starts: by the run itself, and by its dry run.

Nothing is loaded that takes memory or time: of models only names, shapes and configurations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infinite_id_core.hosts.diffusers_unet import unet_layers
from infinite_id_core.method.records import AdapterConfig
from infinite_id_core.scores.score import FaceReader, PackReader

from ..config import Device, FileDtype, Precision, TrainConfig
from ..data_index import Dataset
from ..errors import ConfigValueError
from ..files import check_writable
from ..models.face_models import face_pack
from ..models.image_encoder import check_image_encoder, clip_width
from ..models.text import check_text_encoders
from ..models.unet import SIZE_IDS, describe_unet, unet_fingerprint, unet_name
from ..models.vae import check_vae
from ..prompts import read_prompts
from . import state
from .beginning import beginning
from .features import fingerprints_of, reference_row
from .fp8 import check_fp8, narrow
from .log import logger
from .optimisers import require_package
from .samples import Fingerprints, Plan
from .trackers import check_trackers
from .validation_set import ValidationPlan

DTYPES: dict[Precision | FileDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckedRun:
    """A run that may start, and what was found out on the way."""

    plan: Plan
    held_out: Plan | None
    """Of the people that previews show."""
    validation: ValidationPlan | None
    unet: Any
    """The configured UNet on the meta device, in its working precision."""
    fingerprints: Fingerprints
    recorded: AdapterConfig
    """What is recorded with the adapter."""
    record: state.RunRecord
    """What the run's checkpoints say of it, at step 0."""
    recogniser: FaceReader | None
    """Scores previews."""
    begun: str
    """What ``adapter.start_from`` gives, in numbers; empty without it."""


def check_run(
    config: TrainConfig,
    start: Path | None,
    global_batch: int,
    *,
    world: int | None = None,
    changed: bool = False,
    recogniser: FaceReader | None = None,
) -> CheckedRun:
    """Look at everything a run will meet.

    ``start``: the checkpoint it goes on from; ``global_batch``: samples of one optimiser step;
    ``world``: processes, None where they are not known; ``changed``: it may go on with other
    settings. Raises named errors of data, files,
    models, packages and configuration, ``ResumeError``.
    """
    device = check_device(config.run.device)
    if config.model.unet_dtype == "fp8":
        check_fp8(device)
    _check_packages(config)
    for folder in (Path(config.run.output), config.data.cache_folder):
        check_writable(folder)
    plan = check_data(config, global_batch)
    unet = build_meta(config)
    check_models(config)
    fingerprints = fingerprints_of(config)
    record = state.RunRecord(
        config=config.to_json(),
        fingerprints={
            "dataset": plan.dataset.info.fingerprint,
            "unet": unet_fingerprint(config.model.unet),
            **vars(fingerprints),
        },
        world=world,
    )
    if start is not None:
        record = record.following(state.read_record(start), start, changed)
        plan.redraws = len(record.changes)
        state.read_state(start)
    recorded = adapter_config(config, plan.dataset, int(unet.config.cross_attention_dim))
    begun = ""
    if config.adapter.start_from:
        begun = beginning(config.adapter.start_from, recorded, unet_layers(unet)).told
    held_out = check_held_out(config, global_batch)
    validation = check_validation(config)
    if held_out is not None and config.previews.prompts:
        _check_prompts(config.previews.prompts, unet)
    if held_out is not None and recogniser is None and config.previews.face_models:
        recogniser = PackReader(face_pack(config.previews.face_models))
    return CheckedRun(
        plan=plan,
        held_out=held_out,
        validation=validation,
        unet=unet,
        fingerprints=fingerprints,
        recorded=recorded,
        begun=begun,
        record=record,
        recogniser=recogniser,
    )


def check_device(device: Device) -> torch.device:
    """The device that ``run.device`` stands for. Raises ``ConfigValueError`` where it is absent."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return torch.device(next(name for name, found in there.items() if found))
    if not there[device]:
        raise ConfigValueError(
            f"run.device is {device!r}, and torch {torch.__version__} finds no such device here. "
            'Install torch for it, or set run.device = "auto".'
        )
    return torch.device(device)


def _check_packages(config: TrainConfig) -> None:
    require_package(config.optimiser.kind)
    check_trackers(config)


def check_data(config: TrainConfig, global_batch: int) -> Plan:
    """The people and photos that are learned from: there are pairs, and photos can be read."""
    dataset = Dataset(config.data.folder, config.filters, "train")
    plan = Plan(config, dataset, global_batch)
    plan.choice(0)
    dataset.photo(0)
    return plan


def check_models(config: TrainConfig) -> None:
    """The models whose outputs are cached: their files hold what they should."""
    check_vae(config.model.vae_source)
    check_image_encoder(config.encoder.clip_model, config.encoder.clip_weights)
    if config.objective.reads_text:
        check_text_encoders(config.model.text_source)


def build_meta(config: TrainConfig) -> Any:
    """The configured UNet on the meta device, in its working precision.

    Raises ``NotSDXLError``, subclasses of ``FileError``.
    """
    import diffusers

    described = describe_unet(config.model.unet, head_width=config.model.head_width)
    build: Any = diffusers.UNet2DConditionModel
    with torch.device("meta"):
        unet = build(**described)
    # diffusers' own warns of layers SDXL has none of
    torch.nn.Module.to(unet, DTYPES[config.optimiser.precision])
    if config.model.unet_dtype == "fp8":
        narrow(unet, text=True)
    return unet.requires_grad_(False)


def adapter_config(config: TrainConfig, dataset: Dataset, context_width: int) -> AdapterConfig:
    """What is recorded with the adapter."""
    encoder = config.encoder
    return AdapterConfig(
        clip_width=clip_width(encoder.clip_model),
        context_width=context_width,
        recogniser=dataset.info.recogniser,
        clip_model=encoder.clip_model.removesuffix("-quickgelu"),
        clip_layer=encoder.clip_layer,
        embedding=encoder.embedding,
        face_tokens=config.adapter.face_tokens,
        base_model=unet_name(config.model.unet),
        dataset_fingerprint=dataset.info.fingerprint,
        licence_note=config.run.licence_note,
    )


def check_held_out(config: TrainConfig, global_batch: int) -> Plan | None:
    """The people that previews show: there is one, and their photos can be read.

    None where no previews are made.
    """
    if not config.previews.every:
        return None
    dataset = Dataset(config.data.folder, config.filters, "held_out")
    people = dataset.identities[: config.previews.people]
    if len(people) < config.previews.people:
        logger.warning(
            "previews.people is %d, and no more than %d are held out with photos that pass the "
            "filters. Prepare the photos again with a larger --held-out (finished parts are "
            "kept), or set previews.people = %d.",
            config.previews.people, len(people), len(people),
        )  # fmt: skip
    for name in people:
        dataset.photo(reference_row(dataset, name))
    return Plan(config, dataset, global_batch)


def check_validation(config: TrainConfig) -> ValidationPlan | None:
    """The people that validation is on: there are enough, and their photos can be read.

    None where there is no validation. Raises ``FilterError``, ``TooFewPeopleError``.
    """
    if not config.validation.every:
        return None
    plan = ValidationPlan(config, Dataset(config.data.folder, config.filters, "held_out"))
    for row in sorted(plan.targets | plan.references):
        plan.dataset.photo(row)
    return plan


def _check_prompts(path: str, unet: Any) -> None:
    shape = unet.config
    ids = SIZE_IDS * shape.addition_time_embed_dim
    pooled = int(shape.projection_class_embeddings_input_dim - ids)
    read_prompts(path).check(int(shape.cross_attention_dim), pooled)
