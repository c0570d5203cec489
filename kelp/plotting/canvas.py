"""A page in whole pixels: pictures are pasted as they are, words are set over them."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from kelp.plotting import rendering
from kelp.plotting.rendering import Color, Picture

INK: Final = "#1c2733"
QUIET_INK: Final = "#5b6875"
_DPI: Final = 100
_COLORS: Final = 256  # of a palette
_GRAYS: Final = 24  # of them, for the edges of letters
_SWATCH, _BAR = 14, 120


@dataclass(frozen=True)
class _Words:
    text: str
    y: int
    x: int
    size: float
    bold: bool
    ink: str
    side: Literal["left", "right"]


@dataclass
class Canvas:
    """A white page of `height` x `width` pixels; `png` makes the file."""

    height: int
    width: int
    _pixels: Picture = field(init=False, repr=False)
    _photos: list[Picture] = field(default_factory=list, init=False, repr=False)
    _plain: list[Picture] = field(default_factory=list, init=False, repr=False)
    _words: list[_Words] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self._pixels = np.full((self.height, self.width, 3), 255, dtype=np.uint8)

    def paste(self, picture: Picture, y: int, x: int, times: int = 1, photo: bool = False) -> None:
        """Put a picture down, each of its pixels as a square of `times` x `times`.

        Args:
            picture: shape `(height, width, 3)`.
            y: row of its upper edge.
            x: column of its left edge.
            times: magnification.
            photo: whether it has any number of colours, which may come out a little different.
        """
        large = picture.repeat(times, axis=0).repeat(times, axis=1)
        self._pixels[y : y + large.shape[0], x : x + large.shape[1]] = large
        (self._photos if photo else self._plain).append(picture)

    def words(
        self,
        text: str,
        y: int,
        x: int,
        size: float = 12,
        bold: bool = False,
        ink: str = INK,
        side: Literal["left", "right"] = "left",
    ) -> Self:
        """Set a line of text.

        Args:
            text: the line.
            y: row of its middle.
            x: column of its `side`.
            size: of the letters, in pixels.
            bold: in heavier letters.
            ink: as `#rrggbb`.
            side: which end of the line lies at `x`.
        """
        self._words.append(_Words(text, y, x, size, bold, ink, side))
        return self

    def swatch(self, color: Color | None, text: str, y: int, x: int) -> int:
        """An entry of a legend, `None`: hatched; the column where the next one may begin."""
        patch: Picture = np.full((_SWATCH, _SWATCH, 3), color or 0, dtype=np.uint8)
        if color is None:
            patch = rendering.hatch((_SWATCH, _SWATCH))
        self.paste(patch, y - _SWATCH // 2, x)
        self.words(text, y, x + _SWATCH + 6)
        return x + _SWATCH + 6 + _length(text) + 16

    def bar(self, colors: Picture, low: str, high: str, y: int, x: int) -> int:
        """A colour bar, `colors` of shape `(1, steps, 3)`; the column where the next may begin."""
        where = np.arange(_BAR) * colors.shape[1] // _BAR
        self.words(low, y, x)
        x += _length(low) + 6
        self.paste(colors[:, where].repeat(_SWATCH, axis=0), y - _SWATCH // 2, x)
        self.words(high, y, x + _BAR + 6)
        return x + _BAR + 6 + _length(high) + 16

    def png(self, photo_colors: int = 256) -> bytes:
        """The page as a PNG file with a palette: a third of the bytes of one without.

        What is no photograph has its own colours to the bit; photographs share what is left, at
        most `photo_colors`.
        """
        from PIL import Image

        page = self._drawn()
        grays, plain, photos = self._palette(photo_colors)
        soft = np.concatenate([grays, photos])  # a photograph must not seem to mean something
        shades = Image.new("P", (1, 1))
        shades.putpalette(soft.flatten().tolist())
        image = Image.fromarray(page).quantize(palette=shades, dither=Image.Dither.NONE)
        # Pillow looks colours up in cells of four: those that mean something are put right.
        exact = np.zeros(1 << 24, dtype=np.int16)
        exact[_codes(np.concatenate([grays, plain]))] = [
            *range(1, len(grays) + 1),
            *range(len(soft) + 1, len(soft) + len(plain) + 1),
        ]
        place = exact[_codes(page)]
        content = Image.fromarray(np.where(place, place - 1, np.asarray(image)).astype(np.uint8))
        content.putpalette(np.concatenate([soft, plain]).flatten().tolist())
        file = io.BytesIO()
        content.save(file, "PNG")
        return file.getvalue()

    def _drawn(self) -> Picture:
        """Pictures and words, which lie beside each other."""
        from matplotlib.figure import Figure

        # Half a pixel more, as the size is rounded down.
        size = (self.width + 0.5) / _DPI, (self.height + 0.5) / _DPI
        figure = Figure(size, dpi=_DPI, facecolor="white")
        for words in self._words:
            figure.text(
                words.x / self.width,
                1 - words.y / self.height,
                words.text,
                color=words.ink,
                size=words.size * 72 / _DPI,
                weight="bold" if words.bold else "normal",
                va="center_baseline",
                ha=words.side,
                parse_math=False,
            )
        content = io.BytesIO()
        figure.savefig(content, format="raw")
        drawn = np.frombuffer(content.getvalue(), np.uint8).reshape(self.height, self.width, 4)
        return np.minimum(drawn[..., :3], self._pixels)

    def _palette(self, photo_colors: int) -> tuple[Picture, Picture, Picture]:
        """Grays, the colours of what is no photograph, and those of photographs."""
        from PIL import Image

        grays = np.linspace(0, 255, _GRAYS).round().astype(np.int32) * 0x010101
        pasted = np.concatenate([grays, *(_codes(picture).ravel() for picture in self._plain)])
        codes = np.setdiff1d(np.flatnonzero(np.bincount(pasted)), grays)[: _COLORS - _GRAYS]
        left = min(_COLORS - _GRAYS - len(codes), photo_colors)
        photos = np.zeros((0, 3), np.uint8)
        if self._photos and left:
            strip = np.concatenate([picture.reshape(-1, 3) for picture in self._photos])
            found = Image.fromarray(strip[None]).quantize(left, dither=Image.Dither.NONE)
            photos = np.array(found.getpalette(), dtype=np.uint8).reshape(-1, 3)[:left]
        return _colors(grays), _colors(codes), photos


def _colors(codes: NDArray[np.integer]) -> Picture:
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)


def _codes(colors: Picture) -> NDArray[np.int32]:
    """Colours as one number each."""
    red, green, blue = (colors[..., k].astype(np.int32) for k in range(3))
    return red << 16 | green << 8 | blue


def _length(text: str) -> int:
    """About how many pixels a line of usual size takes."""
    return round(7.4 * len(text)) + 2
