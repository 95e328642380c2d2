"""What every workflow is made of: the columns of models, photos, texts, and the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .graph_builder import Graph, Out

EMBEDDED = "microworld (embedded)"
REFERENCE, REFERENCE_2 = "infinite_id_reference.png", "infinite_id_reference_2.png"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs between the twins."""

    suffix: str
    size: int
    steps: int
    cfg: float
    prompt: str
    other_prompt: str
    negative: str

    @property
    def micro(self) -> bool:
        """Whether it runs on the embedded default."""
        return self.suffix == "micro"


MICRO = Kind(
    suffix="micro",
    size=128,
    steps=20,
    cfg=3.0,  # docs/evidence.md: 5 is too much for the embedded models
    prompt="a photo of a person at the beach, smiling",
    other_prompt="a photo of a person in the forest, with glasses",
    negative="sketch, sepia, neon",
)


SDXL = Kind(
    suffix="sdxl",
    size=1024,
    steps=30,
    cfg=5.0,  # the paper's
    prompt="photo of a person hiking in the mountains, golden hour, 85mm",
    other_prompt="photo of two people at a cafe table, window light, 50mm",
    negative="lowres, deformed, bad anatomy, text, watermark",
)


@dataclass(frozen=True, kw_only=True)
class Base:
    """Outputs of the checkpoint's loader."""

    model: Out
    clip: Out
    vae: Out


@dataclass(frozen=True, kw_only=True)
class Models(Base):
    """Outputs of all loaders."""

    faces: Out | None
    vision: Out | None
    adapter: Out


def loaders(g: Graph, kind: Kind, about: tuple[str, int], *, photo: bool = True) -> Models:
    """The column of models; without a photo there is nothing to detect or encode."""
    g.column("1. Models")
    g.note("What this does", *about)
    base = base_model(g, kind)
    adapter_file = EMBEDDED if kind.micro else "infinite-id-sdxl.safetensors"
    (adapter,) = g.add("InfiniteIDAdapterLoader", file=adapter_file)
    faces = vision = None
    if photo:
        pack = EMBEDDED if kind.micro else "buffalo_l"
        (faces,) = g.add("InfiniteIDFaceModelLoader", pack=pack)
        if kind.micro:
            (vision,) = g.add("InfiniteIDOpenClipLoader", model=EMBEDDED)
        else:
            file = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
            (vision,) = g.add("CLIPVisionLoader", clip_name=file)
    g.note("Which models", *(MICRO_NOTE if kind.micro else SDXL_NOTE))
    return Models(**vars(base), faces=faces, vision=vision, adapter=adapter)


def base_model(g: Graph, kind: Kind) -> Base:
    """The checkpoint, or the embedded model."""
    if kind.micro:
        model, clip, vae = g.add("InfiniteIDMicroModel")
    else:
        model, clip, vae = g.add("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    return Base(model=model, clip=clip, vae=vae)


def short_loaders(g: Graph, kind: Kind, about: tuple[str, int]) -> tuple[Base, Out]:
    """The column of models with the loader that finds what an adapter needs."""
    g.column("1. Models")
    g.note("What this does", *about)
    base = base_model(g, kind)
    (kit,) = g.add("InfiniteIDLoader", preview=130, adapter=EMBEDDED if kind.micro else PLUS_FACE)
    g.note("Which models", *(MICRO_NOTE if kind.micro else SHORT_NOTE))
    return base, kit


PLUS_FACE = (
    "ipadapter/ip-adapter-plus-face_sdxl_vit-h.safetensors "
    "[IP-Adapter plus, plus-face or composition]"
)
SHORT_NOTE = (
    "**Files**\n"
    "- an SDXL checkpoint in `models/checkpoints`\n"
    "- `ip-adapter-plus-face_sdxl_vit-h.safetensors` in `models/ipadapter`, or any adapter of "
    "IP-Adapter, FaceID, InstantID or Infinite-ID\n"
    "- its image encoder (`CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors`) in `models/clip_vision`\n"
    "- the face models `buffalo_l` in `models/insightface/models`\n\n"
    "Run it: what is missing is named.",
    230,
)

MICRO_NOTE = (
    "**Embedded default.** Nothing to download: these loaders read tiny models that ship with "
    "the pack. They know 128 x 128 procedural portraits only; for real pictures open the "
    "`sdxl` twin of this workflow.",
    150,
)


SDXL_NOTE = (
    "**Files**\n"
    "- an SDXL checkpoint in `models/checkpoints`\n"
    "- an Infinite-ID adapter in `models/infinite_id` (train one: `python -m trainer`)\n"
    "- the face models the adapter was trained with in `models/insightface/models/<pack>`\n"
    "- its image encoder in `models/clip_vision`\n\n"
    "Choose your own files where the names differ.",
    230,
)


def person(g: Graph, m: Models, kind: Kind, title: str, number: int = 0) -> Out:
    """Photo -> aligned face -> identity."""
    return photo_and_person(g, m, kind, title, number)[1]


def photo_and_person(
    g: Graph, m: Models, kind: Kind, title: str, number: int = 0
) -> tuple[Out, Out]:
    """The photo, and the identity of its person."""
    assert m.faces and m.vision
    g.column(title)
    image = photo(g, kind, "Reference photo", number)
    faces, *_ = g.add("InfiniteIDAlignFace", preview=240, face_analysis=m.faces, image=image)
    (identity,) = g.add("InfiniteIDEncode", faces=faces, clip_vision=m.vision, adapter=m.adapter)
    return image, identity


def photo(g: Graph, kind: Kind, title: str, number: int = 0) -> Out:
    """A photo of the user's; for the embedded default, which knows no photos, a drawn one."""
    if kind.micro:
        (image,) = g.add("InfiniteIDMicroPortrait", title=title, preview=240, person=number)
        return image
    name = (REFERENCE, REFERENCE_2)[number]
    image, _ = g.add("LoadImage", title=f"{title}: choose yours", preview=240, image=name)
    return image


def texts(g: Graph, m: Base, kind: Kind, prompt: str | None = None) -> tuple[Out, Out]:
    """Positive and negative conditioning, in a column of their own."""
    g.column("3. What to paint")
    return conditioning(g, m, kind, prompt)


def conditioning(g: Graph, m: Base, kind: Kind, prompt: str | None = None) -> tuple[Out, Out]:
    """Positive and negative conditioning."""
    (positive,) = g.add("CLIPTextEncode", title="Prompt", clip=m.clip, text=prompt or kind.prompt)
    (negative,) = g.add("CLIPTextEncode", title="Negative prompt", clip=m.clip, text=kind.negative)
    return positive, negative


def paint(
    g: Graph,
    m: Base,
    kind: Kind,
    model: Out,
    texts: tuple[Out, Out],
    name: str,
    title: str = "4. Picture",
) -> None:
    """Sampler, decoder, saved picture."""
    image = sampled(g, m, kind, model, texts, title)
    g.add("SaveImage", preview=300, images=image, filename_prefix=f"infinite-id/{name}")


def sampled(
    g: Graph,
    m: Base,
    kind: Kind,
    model: Out,
    texts: tuple[Out, Out],
    title: str,
    batch_size: int = 1,
) -> Out:
    """Sampler (the paper's) and decoder."""
    (empty,) = g.add("EmptyLatentImage", width=kind.size, height=kind.size, batch_size=batch_size)
    g.column(title)
    return decoded(g, m, kind, model, texts, empty)


def decoded(
    g: Graph, m: Base, kind: Kind, model: Out, texts: tuple[Out, Out], start: Out, **values: Any
) -> Out:
    """The picture that sampling makes of the latent ``start``."""
    (latent,) = g.add(
        "KSampler",
        model=model,
        seed=7,
        steps=kind.steps,
        cfg=kind.cfg,
        sampler_name="ddim",
        scheduler="ddim_uniform",
        positive=texts[0],
        negative=texts[1],
        latent_image=start,
        **values,
    )
    (image,) = g.add("VAEDecode", samples=latent, vae=m.vae)
    return image


def apply(g: Graph, m: Models, identity: Out, model: Out | None = None, **values: Any) -> Out:
    """The Apply node."""
    (patched,) = g.add(
        "InfiniteIDApply", model=model or m.model, adapter=m.adapter, identity=identity, **values
    )
    return patched
