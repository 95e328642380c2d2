"""Runs the demo's workflow where there is no ComfyUI: its nodes as functions on diffusers.

The arithmetic is the nodes' own: the same face models and image encoder, the same noise for a
seed, and `infinite_id_core.hosts.diffusers_unet`, whose parity with ComfyUI is tested. Only the
node types of `workflows/one_face.micro.json` are known.

A function's positional parameters are its node's sockets; the keyword-only ones are its widgets,
in the page's order. That order is all it takes to read a workflow file without a server's help.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infinite_id_core.encoders.encode import EncodeOptions, encode_faces, parse_weights
from infinite_id_core.encoders.open_clip import OpenClipVision
from infinite_id_core.faces.align import AlignedFace
from infinite_id_core.faces.find import FaceOptions, find_faces_in_batch
from infinite_id_core.faces.pack import load_face_models
from infinite_id_core.files.pictures import read_picture
from infinite_id_core.hosts.diffusers_sample import AppliedIdentity, Prompt, SamplingOptions
from infinite_id_core.hosts.diffusers_sample import sample as sample_latents
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.attention import StreamOptions
from infinite_id_core.method.identity import Identity
from infinite_id_core.sdxl.schedule import SCHEDULER, NoiseSchedule
from microworld import files
from trainer.config import Encoder
from trainer.generate import load_adapter
from trainer.models.text import TextEncoders, load_text_encoders
from trainer.models.unet import MICROWORLD, load_unet
from trainer.models.vae import STRIDE, Autoencoder, load_vae
from trainer.train.features import load_image_encoder

from .comfy_client import ImageRef, Result
from .workflow_api import UnknownNode, WorkflowError
from .workflow_api import to_api as convert

EMBEDDED = "microworld (embedded)"  # as the loaders call it
SAMPLERS = ("ddim", "euler")  # one and the same in these variables

Event = Callable[[str, dict[str, Any]], None]
Progress = Callable[[int, int, Tensor], None]


class HostNeeded(WorkflowError):
    """The workflow asks for something that only ComfyUI has."""


def device() -> torch.device:
    """Where the models are."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- the nodes -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """What flows along MODEL: a UNet and the identities that speak in it."""

    unet: Any
    schedule: NoiseSchedule
    applied: tuple[AppliedIdentity, ...] = ()
    options: StreamOptions = StreamOptions()


@lru_cache(maxsize=1)
def micro_model() -> tuple[Model, TextEncoders, Autoencoder]:
    loaded, text, vae = (load(MICROWORLD) for load in (load_unet, load_text_encoders, load_vae))
    loaded.unet.to(device())
    vae.module.to(device())
    return Model(unet=loaded.unet, schedule=loaded.schedule), text.to(device()), vae


def adapter_loader(*, file: str) -> tuple[Adapter]:
    _embedded(file)
    return (load_adapter(MICROWORLD).to(device()),)


def face_model_loader(*, pack: str, provider: str, detector_size: int) -> tuple[Any]:
    _embedded(pack)
    roots = [files.INSIGHTFACE_ROOT]
    with contextlib.redirect_stdout(sys.stderr):  # insightface prints what it loads
        return (load_face_models(files.INSIGHTFACE_PACK, roots, provider, detector_size),)


def open_clip_loader(*, model: str, weights_file: str) -> tuple[OpenClipVision]:
    _embedded(model)
    return (load_image_encoder(Encoder(clip_model=MICROWORLD)),)


def _embedded(file: str) -> None:
    if file != EMBEDDED:
        raise HostNeeded(
            f"Only the embedded models run without ComfyUI; the workflow names {file}."
        )


def align_face(
    face_analysis: Any,
    image: Tensor,
    *,
    choose: str,
    index: int,
    order: str,
    padding: float,
    if_no_face: str,
) -> tuple[Sequence[AlignedFace]]:
    options = FaceOptions(choose=choose, index=index, order=order, padding=padding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # insightface's use of scikit-image
        found = find_faces_in_batch(face_analysis, image, options, if_no_face)
    return (tuple(chosen for frame in found for chosen in frame.chosen),)


def encode(
    faces: Sequence[AlignedFace],
    clip_vision: OpenClipVision,
    *,
    combine: str,
    weights: str,
    clip_layer: str,
    embedding: str,
) -> tuple[Identity]:
    options = EncodeOptions(
        combine=combine,
        weights=parse_weights(weights),
        clip_layer=clip_layer,
        embedding=embedding,
    )
    return (encode_faces(faces, clip_vision, options),)


def apply(
    model: Model,
    adapter: Adapter,
    identity: Identity,
    *,
    strength: float,
    mixing: str,
    style: str,
    style_strength: float,
    merge_text: bool,
    text_stream: str,
    start_percent: float,
    end_percent: float,
) -> tuple[Model]:
    speaking = AppliedIdentity(
        adapter=adapter,
        identity=identity,
        strength=strength,
        start_percent=start_percent,
        end_percent=end_percent,
    )
    options = StreamOptions(
        mixing=mixing,
        style=style,
        style_strength=style_strength,
        merge_text=merge_text,
        text_stream=text_stream,
    )
    return (replace(model, applied=(*model.applied, speaking), options=options),)


def clip_text_encode(clip: TextEncoders, *, text: str) -> tuple[Prompt]:
    return (clip.encode([text]),)


def empty_latent_image(*, width: int, height: int, batch_size: int) -> tuple[Tensor]:
    return (torch.zeros(batch_size, 4, height // STRIDE, width // STRIDE),)


def k_sampler(
    model: Model,
    positive: Prompt,
    negative: Prompt,
    latent_image: Tensor,
    progress: Progress,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float,
) -> tuple[Tensor]:
    if sampler_name not in SAMPLERS or scheduler not in SCHEDULER or denoise != 1.0:
        raise HostNeeded(
            f"Without ComfyUI the sampler is one of {', '.join(SAMPLERS)}, the scheduler one of "
            f"{', '.join(SCHEDULER)} and denoise 1; the workflow names {sampler_name}, "
            f"{scheduler} and {denoise}."
        )
    noise = torch.randn(latent_image.shape, generator=torch.manual_seed(seed))
    latents = sample_latents(
        model.unet,
        model.applied,
        positive,
        negative,
        noise.to(device()),
        options=model.options,
        sampling=SamplingOptions(steps=steps, guidance=cfg, scheduler=scheduler),
        schedule=model.schedule,
        progress=progress,
    )
    return (latents,)


def vae_decode(samples: Tensor, vae: Autoencoder) -> tuple[Tensor]:
    return (vae.decode(samples).permute(0, 2, 3, 1).cpu(),)  # BCHW -> BHWC


NODES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "InfiniteIDMicroModel": micro_model,
    "InfiniteIDAdapterLoader": adapter_loader,
    "InfiniteIDFaceModelLoader": face_model_loader,
    "InfiniteIDOpenClipLoader": open_clip_loader,
    "InfiniteIDAlignFace": align_face,
    "InfiniteIDEncode": encode,
    "InfiniteIDApply": apply,
    "CLIPTextEncode": clip_text_encode,
    "EmptyLatentImage": empty_latent_image,
    "KSampler": k_sampler,
    "VAEDecode": vae_decode,
}


def load_image(data: bytes) -> tuple[Tensor]:
    """`[1, H, W, 3]` in [0, 1], as LoadImage reads a still picture."""
    picture = read_picture(data)
    if picture.mode == "I":
        picture = picture.point(lambda value: value * (1 / 255))
    return (torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255.0)[None],)


def png(image: Tensor) -> bytes:
    """`[H, W, 3]` in [0, 1] as SaveImage writes it: rounded down."""
    buffer = io.BytesIO()
    pixels = np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# -- reading a workflow ----------------------------------------------------------------------------

_WIDGETS = {"int": "INT", "float": "FLOAT", "str": "STRING", "bool": "BOOLEAN"}
_FILES = {
    "LoadImage": {"input": {"required": {"image": ["COMBO"]}}},
    "InfiniteIDMicroPortrait": {"input": {"required": {"person": ["INT"], "size": ["INT"]}}},
    "SaveImage": {"input": {"required": {"filename_prefix": ["STRING"]}}},
}


def node_info() -> dict[str, Any]:
    """What a server's /object_info would say of the known nodes, as far as files need it."""
    described = {
        name: {
            "input": {
                "required": {
                    parameter.name: [_WIDGETS[str(parameter.annotation)]]
                    for parameter in inspect.signature(node).parameters.values()
                    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
                }
            }
        }
        for name, node in NODES.items()
    }
    return {**described, **_FILES}


def to_api(graph: dict[str, Any]) -> dict[str, Any]:
    """A workflow file as an API prompt: the very one a server would be given.

    Raises HostNeeded for a node that is not one of these, WorkflowError.
    """
    try:
        return convert(graph, node_info())
    except UnknownNode as error:
        kind = next(n["type"] for n in graph["nodes"] if f"'{n['type']}'" in str(error))
        raise HostNeeded(f"The workflow's node {kind} runs in ComfyUI only.") from error


# -- running it ------------------------------------------------------------------------------------


class Diffusers:
    """In place of a `ComfyServer`: takes the same prompts, gives the same pictures but for
    rounding.

    As there, what a node gave is kept, so that models and identity are made once for many prompts.
    """

    def __init__(self) -> None:
        self._uploads: dict[str, bytes] = {}
        self._saved: dict[str, bytes] = {}
        self._done: dict[str, tuple[Any, ...]] = {}

    def upload(self, image: Path | bytes, name: str | None = None) -> str:
        """Keep a picture for LoadImage; returns the name it takes."""
        name = name or (image.name if isinstance(image, Path) else "upload.png")
        self._uploads[name] = image if isinstance(image, bytes) else image.read_bytes()
        return name

    def to_api(self, graph: dict[str, Any]) -> dict[str, Any]:
        """See the function of this name."""
        return to_api(graph)

    def run(self, prompt: dict[str, Any], *, on_event: Event | None = None) -> Result:
        """Compute a prompt. Raises HostNeeded, and what its nodes raise."""
        run = _Run(prompt, self._uploads, self._done, on_event or (lambda *_: None))
        outputs: dict[str, dict[str, Any]] = {}
        for key, node in prompt.items():
            if node["class_type"] != "SaveImage":
                continue
            refs = []
            for picture in run.input(key, "images"):
                name = f"{len(self._saved) + 1}.png"
                self._saved[name] = png(picture)
                refs.append({"filename": name, "subfolder": "", "type": "output"})
            outputs[key] = {"images": refs}
        return Result(prompt_id="", outputs=outputs)

    def fetch(self, image: ImageRef) -> bytes:
        """The bytes of a picture that a prompt made."""
        return self._saved[image.filename]


@dataclass(frozen=True)
class _Run:
    """One prompt on its way from the saved pictures back to the loaders."""

    prompt: dict[str, Any]
    uploads: dict[str, bytes]
    done: dict[str, tuple[Any, ...]]
    on_event: Event

    def input(self, key: str, name: str) -> Any:
        """The value of a node's input: a widget's, or what the linked node gives."""
        value = self.prompt[key]["inputs"][name]
        if isinstance(value, list):
            origin, slot = value
            return self._outputs(origin)[slot]
        return value

    def _outputs(self, key: str) -> tuple[Any, ...]:
        known = self._identity(key)
        if known in self.done:
            self.on_event("execution_cached", {"nodes": [key]})
            return self.done[known]
        node = self.prompt[key]
        given = {name: self.input(key, name) for name in node["inputs"]}
        self.on_event("executing", {"node": key})
        if node["class_type"] == "LoadImage":
            self.done[known] = load_image(self.uploads[given["image"]])
            return self.done[known]
        function = NODES[node["class_type"]]
        if "progress" in inspect.signature(function).parameters:
            given["progress"] = self._progress
        self.done[known] = function(**given)
        return self.done[known]

    def _identity(self, key: str) -> str:
        """The same for two nodes exactly where they compute the same."""

        def told(value: Any) -> Any:
            return [self._identity(value[0]), value[1]] if isinstance(value, list) else value

        node = self.prompt[key]
        inputs = {name: told(value) for name, value in sorted(node["inputs"].items())}
        return json.dumps([node["class_type"], inputs])

    def _progress(self, step: int, steps: int, _: Tensor) -> None:
        self.on_event("progress", {"value": step, "max": steps})
