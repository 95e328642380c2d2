"""Writes workflows/*.json: every workflow twice, for the embedded default and for real SDXL.

    python -m tools.make_workflows          # needs ComfyUI, for its node descriptions

The twins come from one description, so they cannot drift apart.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .graph_builder import Graph
from .workflow_parts import (
    EMBEDDED,
    MICRO,
    SDXL,
    Kind,
    apply,
    conditioning,
    decoded,
    loaders,
    paint,
    person,
    photo,
    photo_and_person,
    sampled,
    short_loaders,
    texts,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "workflows"


def one_person(g: Graph, kind: Kind) -> None:
    about = (
        "Two nodes: Loader takes an adapter you have (IP-Adapter, FaceID, InstantID, or one of "
        "Infinite-ID) and finds what it needs; Person takes a photo."
    )
    base, kit = short_loaders(g, kind, (about, 110))
    g.column("2. Who")
    photos = photo(g, kind, "Reference photo")
    model, *_ = g.add(
        "InfiniteIDPerson", preview=240, model=base.model, infinite_id=kit, photos=photos
    )
    prompts = texts(g, base, kind)
    paint(g, base, kind, model, prompts, "one_person")


def one_stream_and_two(g: Graph, kind: Kind) -> None:
    about = (
        "One photo, one prompt, one seed: as the adapter's authors run it (one stream), and with "
        "the two streams of Infinite-ID."
    )
    base, kit = short_loaders(g, kind, (about, 90))
    pack = EMBEDDED if kind.micro else "buffalo_l"
    (faces,) = g.add("InfiniteIDFaceModelLoader", title="Face models for Score", pack=pack)
    g.column("2. Who")
    photos = photo(g, kind, "Reference photo")
    prompts = conditioning(g, base, kind)
    (empty,) = g.add("EmptyLatentImage", width=kind.size, height=kind.size, batch_size=1)
    pictures = []
    for number, preset in enumerate(("one stream", "balanced"), 3):
        g.column(f"{number}. {preset.capitalize()}")
        model, *_ = g.add(
            "InfiniteIDPerson",
            title=f"Person: {preset}",
            preview=200,
            model=base.model,
            infinite_id=kit,
            photos=photos,
            preset=preset,
        )
        pictures.append(decoded(g, base, kind, model, prompts, empty))
    g.column("5. Side by side")
    (both,) = g.add("ImageBatch", image1=pictures[0], image2=pictures[1])
    g.add(
        "InfiniteIDScore",
        preview=160,  # the table
        images=both,
        face_analysis=faces,
        reference=photos,
        prompt="",
    )
    (beside,) = g.add("ImageStitch", image1=pictures[0], image2=pictures[1])
    g.add(
        "SaveImage",
        preview=300,
        images=beside,
        filename_prefix="infinite-id/one_stream_and_two",
    )
    g.note(
        "What to look at",
        "On the left, and picture 0 in the table, the one stream; on the right the two. One stream "
        "costs half; two follow the prompt and its style more closely.",
        110,
    )


def one_face(g: Graph, kind: Kind) -> None:
    about = "A photo of a person and a prompt in; that person, doing what the prompt says, out."
    m = loaders(g, kind, (about, 80))
    identity = person(g, m, kind, "2. Who")
    prompts = texts(g, m, kind)
    model = apply(g, m, identity)
    paint(g, m, kind, model, prompts, "one_face")


def style_presets(g: Graph, kind: Kind) -> None:
    about = "The person of the photo in one of twelve styles: choose it in Style Preset."
    m = loaders(g, kind, (about, 80))
    identity = person(g, m, kind, "2. Who")
    g.column("3. What to paint, in which style")
    values = {"presets": MICRO_STYLES} if kind.micro else {}
    prompt = "a person at the beach, smiling" if kind.micro else "a person reading by a window"
    positive, negative = g.add(
        "InfiniteIDStylePreset",
        prompt=prompt,
        negative="" if kind.micro else kind.negative,
        style="pencil sketch",
        **values,
    )
    (yes,) = g.add("CLIPTextEncode", title="Prompt in that style", clip=m.clip, text=positive)
    (no,) = g.add("CLIPTextEncode", title="Negative in that style", clip=m.clip, text=negative)
    g.column("4. Apply")
    model = apply(g, m, identity)
    four = (
        " The embedded models know four styles (photo, sketch, sepia, neon); the others borrow one."
    )
    g.note(
        "Styles",
        "The styles are text: edit a line, or its words after `|`, which are avoided. "
        "`style = adain_mean` in Apply is what lets the style through; `style_strength` doses it."
        + (four if kind.micro else ""),
        120,
    )
    paint(g, m, kind, model, (yes, no), "style_presets", "5. Picture")


MICRO_STYLES = """\
anime = a neon picture of {prompt} | photo
comic book = a neon picture of {prompt} | sepia
line art = a sketch of {prompt} | neon
oil painting = a sepia photo of {prompt} | neon
watercolour = a sketch of {prompt} | sepia
pencil sketch = a sketch of {prompt} | photo, colour
sepia photograph = a sepia photo of {prompt} | neon, colour
neon cyberpunk = a neon picture of {prompt} | sepia, grey
pixel art = a neon picture of {prompt} | sketch
3d render = a photo of {prompt} | sketch
impressionist = a sepia photo of {prompt} | sketch
pop art = a neon picture of {prompt} | photo, sepia"""


def mix_two_people(g: Graph, kind: Kind) -> None:
    about = "One new person out of two photos. `ratio` in Mix says how much of each."
    m = loaders(g, kind, (about, 80))
    first = person(g, m, kind, "2a. First person")
    second = person(g, m, kind, "2b. Second person", 1)
    prompts = texts(g, m, kind)
    (both,) = g.add(
        "InfiniteIDMix", identity_a=first, identity_b=second, mode="interpolate", ratio=0.5
    )
    g.note(
        "Mixing",
        "`ratio` 0 is the first person, 1 the second. `interpolate` goes straight from one to the "
        "other; with `stack` the model reads both side by side.",
        100,
    )
    model = apply(g, m, both)
    paint(g, m, kind, model, prompts, "mix_two_people")


def save_identity(g: Graph, kind: Kind) -> None:
    about = "Keeps the person of the photo in a file, so that the photo is not needed again."
    m = loaders(g, kind, (about, 80))
    identity = person(g, m, kind, "2. Who")
    g.column("3. Keep it, and try it")
    g.add(
        "InfiniteIDSaveIdentity",
        preview=40,  # the line that says what was saved
        identity=identity,
        name="my person",
        if_exists="overwrite",
    )
    g.note(
        "The file",
        "The file holds numbers that tell this person from others, and no photo. It is "
        "biometric data: treat it as you would the photo. Open `use_saved_identity` next.",
        120,
    )
    prompts = conditioning(g, m, kind)
    model = apply(g, m, identity)
    paint(g, m, kind, model, prompts, "save_identity")


def use_saved_identity(g: Graph, kind: Kind) -> None:
    about = "A saved person in a new picture: no photo, no face models, no image encoder."
    m = loaders(g, kind, (about, 80), photo=False)
    g.column("2. Who")
    (identity,) = g.add("InfiniteIDLoadIdentity", file="my person.safetensors")
    g.note(
        "The file",
        "Run the workflow `save_identity` first: it writes this file. If you named yours "
        "otherwise, press R to refresh the list and choose it.",
        90,
    )
    prompts = texts(g, m, kind, kind.other_prompt if kind.micro else None)
    model = apply(g, m, identity)
    paint(g, m, kind, model, prompts, "use_saved_identity")


def two_people(g: Graph, kind: Kind) -> None:
    about = "Two people in one picture. Each Apply paints its person where its mask is white."
    m = loaders(g, kind, (about, 80))
    left_person = person(g, m, kind, "2a. Person on the left")
    right_person = person(g, m, kind, "2b. Person on the right", 1)
    g.column("2c. Where they are")
    size = kind.size
    (black,) = g.add("SolidMask", title="Black, all of it", value=0.0, width=size, height=size)
    (half,) = g.add("SolidMask", title="White half", value=1.0, width=size // 2, height=size)
    (left,) = g.add(
        "MaskComposite",
        title="White on the left",
        destination=black,
        source=half,
        x=0,
        y=0,
        operation="add",
    )
    (right,) = g.add("InvertMask", title="White on the right", mask=left)
    g.note(
        "Masks",
        "Any mask will do: draw your own in the mask editor of a Load Image node. Masks may "
        "overlap; where none is white, only the prompt takes effect.",
        100,
    )
    prompts = texts(g, m, kind, kind.other_prompt)
    first = apply(g, m, left_person, title="Apply: person on the left", mask=left)
    second = apply(g, m, right_person, first, title="Apply: person on the right", mask=right)
    paint(g, m, kind, second, prompts, "two_people")


def small_face_detail(g: Graph, kind: Kind) -> None:
    about = "Gives a small face in a finished picture a pass of its own."
    m = loaders(g, kind, (about, 80))
    identity = person(g, m, kind, "2. Who")
    assert m.faces
    g.column("3. Picture with a small face")
    image = photo(g, kind, "Picture to mend")
    crop, region, mask = g.add(
        "InfiniteIDFaceCrop", face_analysis=m.faces, image=image, size=kind.size
    )
    g.add("PreviewImage", title="The face, enlarged", preview=240, images=crop)
    g.note(
        "The detail pass",
        "A face of a few pixels gets a pass of its own: cut out, enlarged, painted again with "
        "the identity at low `denoise`, and set back with a soft edge.",
        110,
    )
    g.column("4. Detail pass")
    prompts = conditioning(g, m, kind)
    # A second pass begins with a finished picture: the prompt's cannot come from noise of its own.
    model = apply(g, m, identity, text_stream="shared")
    g.column("5. Mended picture")
    (latent,) = g.add("VAEEncode", pixels=crop, vae=m.vae)
    (latent,) = g.add("SetLatentNoiseMask", title="Only the face", samples=latent, mask=mask)
    face = decoded(g, m, kind, model, prompts, latent, denoise=0.45)
    (mended,) = g.add("InfiniteIDFacePaste", image=image, crop=face, region=region)
    g.add("SaveImage", preview=300, images=mended, filename_prefix="infinite-id/small_face_detail")


def best_of_batch(g: Graph, kind: Kind) -> None:
    about = "Makes four pictures and keeps the one that looks most like the person."
    m = loaders(g, kind, (about, 80))
    photo, identity = photo_and_person(g, m, kind, "2. Who")
    prompts = texts(g, m, kind)
    model = apply(g, m, identity)
    pictures = sampled(g, m, kind, model, prompts, "4. Four pictures", batch_size=4)
    _, best, ranked, _ = g.add(
        "InfiniteIDScore",
        preview=180,  # the table
        images=pictures,
        face_analysis=m.faces,
        identity=identity,
        reference=photo,
        clip_vision=m.vision,
        prompt=kind.prompt if kind.micro else "",
    )
    g.column("5. The best of them")
    g.add("SaveImage", preview=300, images=best, filename_prefix="infinite-id/best_of_batch")
    g.add("PreviewImage", title="All four by rank", preview=300, images=ranked)
    g.note(
        "How they are ranked",
        "Pictures are ranked by M_face, how alike the faces are; without a face it is 0. "
        "`batch_size` in Empty Latent Image says how many are made."
        + (
            ""
            if kind.micro
            else " For CLIP-T too, load the image encoder with Infinite-ID Load open_clip and "
            "write the prompt into Score."
        ),
        130,
    )


WORKFLOWS: dict[str, Callable[[Graph, Kind], None]] = {
    draw.__name__: draw
    for draw in (
        one_person,
        one_face,
        style_presets,
        mix_two_people,
        save_identity,
        use_saved_identity,
        two_people,
        small_face_detail,
        best_of_batch,
        one_stream_and_two,
    )
}


def build(info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every file's content by its name; ``info`` is the server's /object_info."""
    files = {}
    for name, draw in WORKFLOWS.items():
        for kind in (MICRO, SDXL):
            graph = Graph(info)
            draw(graph, kind)
            files[f"{name}.{kind.suffix}.json"] = graph.dump()
    return files


def main() -> int:
    from run import find_host

    from .comfy_live import ComfyServer

    host = find_host()
    if host is None:
        print("No ComfyUI found: set COMFYUI_PATH, or run python run.py setup.", file=sys.stderr)
        return 1
    with ComfyServer(host=host, pack=ROOT, cpu=True) as server:
        files = build(server.object_info())
    FOLDER.mkdir(exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"workflows/{name}: {len(content['nodes'])} nodes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
