"""Style presets: prompt texts around the user's own, one style a line, editable as text.

sepia photograph = a sepia photograph of {prompt} | colour, neon
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import OptionError, shown

PLACE = "{prompt}"

TWELVE = """\
anime = anime artwork of {prompt}, cel shading, clean lines | photo, 3d render, realistic
comic book = comic book panel of {prompt}, bold ink, halftone dots | photo, blurry, 3d render
line art = line art drawing of {prompt}, black ink on white paper | photo, colour, shading
oil painting = oil painting of {prompt}, visible brush strokes, canvas | photo, anime, smooth
watercolour = watercolour painting of {prompt}, soft washes, paper grain | photo, 3d render, ink
pencil sketch = pencil sketch of {prompt}, graphite, hatching | photo, colour, painting
sepia photograph = old sepia photograph of {prompt}, film grain | colour, neon, drawing
neon cyberpunk = cyberpunk picture of {prompt}, neon lights, rain at night | daylight, sepia
pixel art = pixel art of {prompt}, 16-bit, limited palette | photo, smooth, blurry
3d render = 3d render of {prompt}, soft studio light, subsurface skin | photo, flat, sketch
impressionist = impressionist painting of {prompt}, broken colour, light | photo, sharp lines
pop art = pop art print of {prompt}, flat bright colours, bold outline | photo, sepia, muted"""


@dataclass(frozen=True, kw_only=True)
class StylePreset:
    """One style: the texts that go around and beside the user's prompt."""

    positive: str
    """Contains ``{prompt}`` once or more."""
    negative: str = ""

    def apply(self, prompt: str, negative: str = "") -> tuple[str, str]:
        """The positive and the negative prompt in this style."""
        parts = [part.strip() for part in (negative, self.negative) if part.strip()]
        return self.positive.replace(PLACE, prompt.strip()), ", ".join(parts)


def parse_presets(text: str) -> dict[str, StylePreset]:
    """Styles by name, in order; empty lines are skipped.

    Raises ``OptionError`` naming the line that is not ``name = text {prompt} | negative``.
    """
    presets: dict[str, StylePreset] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, equals, texts = line.partition("=")
        positive, _, negative = (part.strip() for part in texts.partition("|"))
        name = name.strip()
        if not equals or not name or PLACE not in positive or name in presets:
            raise OptionError(
                f"Style presets, line {number}: expected 'name = text with {PLACE} | negative "
                f"text' with a new name, found {shown(line.strip())}."
            )
        presets[name] = StylePreset(positive=positive, negative=negative)
    return presets


def choose_preset(text: str, name: str) -> StylePreset:
    """One style by name. Raises ``OptionError`` listing the names there are."""
    presets = parse_presets(text)
    if name not in presets:
        raise OptionError(
            f"No style {shown(name)} among the presets; found {', '.join(presets) or 'none'}. Add "
            "a line for it or choose another."
        )
    return presets[name]


STYLE_NAMES: tuple[str, ...] = tuple(parse_presets(TWELVE))
