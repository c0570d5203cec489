"""A page in whole pixels: pictures are pasted as they are, text is drawn beside them."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from kelp.plotting import rendering
from kelp.plotting.rendering import Picture
from kelp.plotting.style import INK, Color

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

_SWATCH, _BAR, _SPACE, _GAP = 14, 120, 6, 16
_SHADES: Final = 17
"""Between steps of 255: few enough shades at the edges of letters for a palette."""
_COLORS: Final = 256


class Canvas:
    """A white page of `height` x `width` pixels; `png` makes the file."""

    def __init__(self, height: int, width: int) -> None:
        from PIL import Image

        self.height, self.width = height, width
        self._page = Image.new("RGB", (width, height), "white")
        self._photos: list[tuple[Picture, int, int, int]] = []

    def paste(self, picture: Picture, y: int, x: int, times: int = 1, photo: bool = False) -> None:
        """Put a picture down, each of its pixels as a square of `times` x `times`.

        Args:
            picture: shape `(height, width, 3)`.
            y: row of its upper edge.
            x: column of its left edge.
            times: magnification.
            photo: whether it has any number of colours, which may come out a little different.
        """
        from PIL import Image

        if photo:
            self._photos.append((picture, y, x, times))
            return
        large = picture.repeat(times, axis=0).repeat(times, axis=1)
        self._page.paste(Image.fromarray(large), (x, y))

    def words(
        self,
        text: str,
        y: int,
        x: int,
        size: int = 12,
        bold: bool = False,
        ink: str = INK,
        side: Literal["left", "right"] = "left",
    ) -> int:
        """Set a line of text; the column where it ends.

        Args:
            text: the line.
            y: row of its middle.
            x: column of its `side`.
            size: of the letters, in pixels.
            bold: in heavier letters.
            ink: as `#rrggbb`.
            side: which end of the line lies at `x`.
        """
        from PIL import Image, ImageDraw

        font = _font(size, bold)
        mask = Image.new("L", self._page.size)
        ImageDraw.Draw(mask).text((x, y), text, 255, font, anchor=f"{side[0]}m")
        shades = [round(value / _SHADES) * _SHADES for value in range(256)]
        if box := mask.getbbox():
            self._page.paste(ink, box, mask.crop(box).point(shades))
        return x + round(font.getlength(text))

    def swatch(self, color: Color | None, text: str, y: int, x: int) -> int:
        """An entry of a legend, `None`: hatched; the column where the next one may begin."""
        patch: Picture = np.full((_SWATCH, _SWATCH, 3), color or 0, dtype=np.uint8)
        if color is None:
            patch = rendering.hatch((_SWATCH, _SWATCH))
        self.paste(patch, y - _SWATCH // 2, x)
        return self.words(text, y, x + _SWATCH + _SPACE) + _GAP

    def bar(self, colors: Picture, low: str, high: str, y: int, x: int) -> int:
        """A colour bar, `colors` of shape `(1, steps, 3)`; the column where the next may begin."""
        where = np.arange(_BAR) * colors.shape[1] // _BAR
        x = self.words(low, y, x) + _SPACE
        self.paste(colors[:, where].repeat(_SWATCH, axis=0), y - _SWATCH // 2, x)
        return self.words(high, y, x + _BAR + _SPACE) + _GAP

    def png(self, photo_colors: int) -> bytes:
        """The page as a PNG file, with a palette where 256 colours are enough.

        Photographs share `photo_colors`; all else has its own colours to the bit.
        """
        self._paste_photos(photo_colors)
        file = io.BytesIO()
        _with_palette(self._page).save(file, "PNG")
        return file.getvalue()

    def _paste_photos(self, colors: int) -> None:
        from PIL import Image

        if not self._photos:
            return
        # In one strip, they are given one set of colours.
        strip = np.concatenate([picture.reshape(-1, 3) for picture, *_ in self._photos])
        few = Image.fromarray(strip[None]).quantize(colors, dither=Image.Dither.NONE)
        pixels, start = np.asarray(few.convert("RGB"))[0], 0
        photos, self._photos = self._photos, []
        for picture, y, x, times in photos:
            stop = start + picture.shape[0] * picture.shape[1]
            self.paste(pixels[start:stop].reshape(picture.shape), y, x, times)
            start = stop


def _with_palette(page: Image) -> Image:
    """The same picture in a third of the bytes."""
    from PIL import Image

    pixels = np.asarray(page).astype(np.uint32)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    found, places = np.unique(codes, return_inverse=True)
    if len(found) > _COLORS:
        return page
    small = Image.fromarray(places.reshape(codes.shape).astype(np.uint8))
    small.putpalette(
        np.stack([found >> 16, found >> 8 & 255, found & 255], axis=-1).ravel().tolist()
    )
    return small


@cache
def _font(size: int, bold: bool) -> FreeTypeFont:
    """The letters of matplotlib's charts, which come with it."""
    import matplotlib as mpl
    from PIL import ImageFont

    fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(fonts / f"DejaVuSans{'-Bold' if bold else ''}.ttf", size)
