"""Pictures side by side with a caption under each, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

HEIGHT = 256  # pixels, of each picture
GAP = 8
FONT_SIZE = 14
_PAPER, _INK = "white", "#333"


def strip(pictures: Sequence[tuple[Image.Image, str]], height: int = HEIGHT) -> Image.Image:
    """`(picture, caption)` from left to right, all scaled to one height. Captions wrap."""
    scaled = [(_scaled(picture, height), caption) for picture, caption in pictures]
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrapped(caption, font, picture.width) for picture, caption in scaled]
    lines = max(text.count("\n") + 1 if text else 0 for text in texts)
    line = round(1.35 * FONT_SIZE)
    below = lines * line + 2 * GAP if lines else 0
    width = sum(picture.width for picture, _ in scaled) + GAP * (len(scaled) - 1)
    sheet = Image.new("RGB", (width, height + below), _PAPER)
    draw = ImageDraw.Draw(sheet)
    x = 0
    for (picture, _), text in zip(scaled, texts, strict=True):
        sheet.paste(picture, (x, 0))
        for number, words in enumerate(text.split("\n")):
            draw.text((x + 2, height + GAP + number * line), words, fill=_INK, font=font)
        x += picture.width + GAP
    return sheet


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    picture = picture.convert("RGB")
    width = max(1, round(picture.width * height / picture.height))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The words of a text in lines of at most `width` pixels; a word is never cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width - 4:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
