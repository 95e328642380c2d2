"""The demo's workflow where there is no ComfyUI: its settings, painted by the trainer's painter.

The arithmetic is the nodes' own, and so are the face models, the image encoder and the noise for
a seed. Only workflows of the shape of `workflows/one_face.micro.json` are known: one sampler, an
Apply for each person, a photo each.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infinite_id_core.encoders.encode import EncodeOptions, parse_weights
from infinite_id_core.faces.find import FaceOptions
from infinite_id_core.files.pictures import read_picture
from infinite_id_core.hosts.diffusers_sample import AppliedIdentity, SamplingOptions
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.attention import StreamOptions
from infinite_id_core.method.identity import Identity
from infinite_id_core.sdxl.schedule import SCHEDULER
from trainer.models.source import MICROWORLD
from trainer.models.vae import STRIDE
from trainer.painter import (
    IdentityReader,
    Painter,
    Sources,
    encode_texts,
    load_adapter,
    load_painter,
)

from .comfy_client import ImageRef, Result
from .workflow_api import UnknownNode, WorkflowError
from .workflow_api import to_api as convert

EMBEDDED = "microworld (embedded)"  # as the loaders call it
SAMPLERS = ("ddim", "euler")  # one and the same in these variables
SOURCES = Sources(unet=MICROWORLD)

Event = Callable[[str, dict[str, Any]], None]
Node = dict[str, Any]

# The widgets of the known nodes in the page's order: all it takes to read a workflow file.
_WIDGETS = {
    "InfiniteIDMicroModel": "",
    "InfiniteIDAdapterLoader": "file:COMBO",
    "InfiniteIDFaceModelLoader": "pack:COMBO provider:COMBO detector_size:INT",
    "InfiniteIDOpenClipLoader": "model:COMBO weights_file:COMBO",
    "InfiniteIDMicroPortrait": "person:INT size:INT",
    "InfiniteIDAlignFace": "choose:COMBO index:INT order:COMBO padding:FLOAT if_no_face:COMBO",
    "InfiniteIDEncode": "combine:COMBO weights:STRING clip_layer:COMBO embedding:COMBO",
    "InfiniteIDApply": "strength:FLOAT mixing:COMBO style:COMBO style_strength:FLOAT "
    "merge_text:BOOLEAN text_stream:COMBO start_percent:FLOAT end_percent:FLOAT",
    "LoadImage": "image:COMBO",
    "CLIPTextEncode": "text:STRING",
    "EmptyLatentImage": "width:INT height:INT batch_size:INT",
    "KSampler": "seed:INT steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO denoise:FLOAT",
    "VAEDecode": "",
    "SaveImage": "filename_prefix:STRING",
}


class HostNeeded(WorkflowError):
    """The workflow asks for something that only ComfyUI has."""


def to_api(graph: dict[str, Any]) -> dict[str, Any]:
    """A workflow file as an API prompt: the very one a server would be given.

    Raises HostNeeded for a node that is not one of these, WorkflowError.
    """
    described = {
        name: {"input": {"required": {w.split(":")[0]: [w.split(":")[1]] for w in text.split()}}}
        for name, text in _WIDGETS.items()
    }
    try:
        return convert(graph, described)
    except UnknownNode as error:
        kind = next(n["type"] for n in graph["nodes"] if f"'{n['type']}'" in str(error))
        raise HostNeeded(f"The workflow's node {kind} runs in ComfyUI only.") from error


def load_image(data: bytes) -> Tensor:
    """`[H, W, 3]` in [0, 1], as LoadImage reads a still picture."""
    picture = read_picture(data)
    if picture.mode == "I":
        picture = picture.point(lambda value: value * (1 / 255))
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255.0)


def png(image: Tensor) -> bytes:
    """`[3, H, W]` in [0, 1] as SaveImage writes it: rounded down."""
    buffer = io.BytesIO()
    pixels = np.clip(255.0 * image.permute(1, 2, 0).numpy(), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Diffusers:
    """In place of a `ComfyServer`: takes the same prompts, gives the same pictures but for
    rounding. Models are loaded and photos read once for many prompts."""

    def __init__(self) -> None:
        self._uploads: dict[str, bytes] = {}
        self._saved: dict[str, bytes] = {}
        self._identities: dict[str, Identity] = {}
        self._reader = IdentityReader()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _painter(self) -> Painter:
        return load_painter(SOURCES, self._device)

    @cached_property
    def _adapter(self) -> Adapter:
        return load_adapter(MICROWORLD).to(self._device)

    def upload(self, image: Path | bytes, name: str | None = None) -> str:
        """Keep a picture for LoadImage; returns the name it takes."""
        name = name or (image.name if isinstance(image, Path) else "upload.png")
        self._uploads[name] = image if isinstance(image, bytes) else image.read_bytes()
        return name

    def to_api(self, graph: dict[str, Any]) -> dict[str, Any]:
        """See the function of this name."""
        return to_api(graph)

    def run(self, prompt: dict[str, Any], *, on_event: Event | None = None) -> Result:
        """Compute a prompt. Raises HostNeeded, and what painting raises."""
        graph = _Graph(prompt, on_event or (lambda *_: None))
        for node in prompt.values():
            for name in ("file", "pack", "model"):
                named = node["inputs"].get(name)
                if isinstance(named, str) and named != EMBEDDED:
                    raise HostNeeded(
                        f"Only the embedded models run without ComfyUI; the workflow names {named}."
                    )
        outputs: dict[str, dict[str, Any]] = {}
        for key, node in prompt.items():
            if node["class_type"] == "SaveImage":
                made = self._paint(graph, graph.linked(node, "images", "VAEDecode"))
                outputs[key] = {"images": [self._save(picture) for picture in made]}
        return Result(prompt_id="", outputs=outputs)

    def fetch(self, image: ImageRef) -> bytes:
        """The bytes of a picture that a prompt made."""
        return self._saved[image.filename]

    def _save(self, picture: Tensor) -> dict[str, str]:
        name = f"{len(self._saved) + 1}.png"
        self._saved[name] = png(picture)
        return {"filename": name, "subfolder": "", "type": "output"}

    def _paint(self, graph: _Graph, decode: Node) -> Tensor:
        sampler = graph.linked(decode, "samples", "KSampler")
        given = sampler["inputs"]
        _check_sampler(given)
        applied, options = self._applied(graph, sampler)
        positive, negative = (
            graph.linked(sampler, side, "CLIPTextEncode")["inputs"]["text"]
            for side in ("positive", "negative")
        )
        prompts = encode_texts(SOURCES, [positive, negative], self._device)
        size = graph.linked(sampler, "latent_image", "EmptyLatentImage")["inputs"]
        shape = (size["batch_size"], 4, size["height"] // STRIDE, size["width"] // STRIDE)
        graph.working(sampler)
        return self._painter.paint(
            prompts[positive],
            prompts[negative],
            torch.randn(shape, generator=torch.manual_seed(given["seed"])),
            applied,
            options=options,
            sampling=SamplingOptions(
                steps=given["steps"], guidance=given["cfg"], scheduler=given["scheduler"]
            ),
            progress=lambda step, steps, _: graph.on_event(
                "progress", {"value": step, "max": steps}
            ),
        )

    def _applied(self, graph: _Graph, sampler: Node) -> tuple[list[AppliedIdentity], StreamOptions]:
        applied, options, node = [], StreamOptions(), graph.linked(sampler, "model")
        while node["class_type"] == "InfiniteIDApply":
            given = {k: v for k, v in node["inputs"].items() if not isinstance(v, list)}
            own = {k: given.pop(k) for k in ("strength", "start_percent", "end_percent")}
            identity = self._identity(graph, graph.linked(node, "identity", "InfiniteIDEncode"))
            one = AppliedIdentity(adapter=self._adapter, identity=identity, **own)
            # The last one's options hold, as with the nodes.
            options = options if applied else StreamOptions(**given)
            applied, node = [one, *applied], graph.linked(node, "model")
        return applied, options

    def _identity(self, graph: _Graph, encode: Node) -> Identity:
        align = graph.linked(encode, "faces", "InfiniteIDAlignFace")
        image = graph.linked(align, "image", "LoadImage")["inputs"]["image"]
        words, finding = encode["inputs"], align["inputs"]
        known = json.dumps([image, *(v for n in (words, finding) for v in n.values())])
        if known not in self._identities:
            graph.working(encode)
            with _quiet():
                self._identities[known] = self._reader.read(
                    self._adapter,
                    {image: load_image(self._uploads[image])},
                    FaceOptions(**{n: finding[n] for n in ("choose", "index", "order", "padding")}),
                    EncodeOptions(
                        combine=words["combine"],
                        weights=parse_weights(words["weights"]),
                        clip_layer=words["clip_layer"],
                        embedding=words["embedding"],
                    ),
                )
        return self._identities[known]


class _Graph:
    """An API prompt, read against its links."""

    def __init__(self, prompt: dict[str, Any], on_event: Event) -> None:
        self.prompt, self.on_event = prompt, on_event

    def linked(self, node: Node, name: str, wanted: str = "") -> Node:
        """The node at the other end of an input. Raises HostNeeded for one of another type."""
        value = node["inputs"].get(name)
        found: Node | None = self.prompt.get(value[0]) if isinstance(value, list) else None
        if found is None or wanted not in ("", found["class_type"]):
            raise HostNeeded(
                f"Without ComfyUI {node['class_type']} takes its {name} from "
                f"{wanted or 'another node'} only; this workflow runs in ComfyUI."
            )
        return found

    def working(self, node: Node) -> None:
        """Say that a node is at work."""
        key = next(key for key, one in self.prompt.items() if one is node)
        self.on_event("executing", {"node": key})


def _check_sampler(given: dict[str, Any]) -> None:
    sampler, scheduler, denoise = (given[n] for n in ("sampler_name", "scheduler", "denoise"))
    if sampler not in SAMPLERS or scheduler not in SCHEDULER or denoise != 1.0:
        raise HostNeeded(
            f"Without ComfyUI the sampler is one of {', '.join(SAMPLERS)}, the scheduler one of "
            f"{', '.join(SCHEDULER)} and denoise 1; the workflow names {sampler}, {scheduler} and "
            f"{denoise}."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """insightface prints what it loads, and scikit-image warns of how it is used."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
