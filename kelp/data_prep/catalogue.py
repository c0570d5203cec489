"""`kelp indices`: the spectral indices as text, formulas printed by the code that computes them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Final

from kelp.config import IndicesConfig
from kelp.progress import Progress, silent
from kelp.raster.indices import INDICES, Index, parse_indices

_SUM, _QUOTIENT, _PRODUCT, _ATOM = range(4)
_WIDTH: Final = 100


@dataclass(frozen=True)
class _Term:
    """A plane that is not computed but written down."""

    text: str
    rank: int = _ATOM

    def _in(self, rank: int) -> str:
        return self.text if self.rank >= rank else f"({self.text})"

    def __add__(self, other: Any) -> _Term:
        return _Term(f"{self.text} + {_term(other).text}", _SUM)

    def __radd__(self, other: Any) -> _Term:
        return _term(other) + self

    def __sub__(self, other: Any) -> _Term:
        return _Term(f"{self.text} - {_term(other)._in(_QUOTIENT)}", _SUM)

    def __rsub__(self, other: Any) -> _Term:
        return _term(other) - self

    def __mul__(self, other: Any) -> _Term:
        return _Term(f"{self._in(_PRODUCT)} {_term(other)._in(_PRODUCT)}", _PRODUCT)

    def __rmul__(self, other: Any) -> _Term:
        return _Term(f"{_term(other).text} {self._in(_PRODUCT)}", _PRODUCT)

    def __truediv__(self, other: Any) -> _Term:
        return _Term(f"{self._in(_PRODUCT)} / {_term(other)._in(_ATOM)}", _QUOTIENT)

    def __abs__(self) -> _Term:
        return self

    def __lt__(self, other: Any) -> bool:
        return False

    def masked_fill(self, condition: Any, value: float) -> _Term:
        """Where it is missing is not part of its formula."""
        return self

    def clip(self, min: float) -> _Term:
        """As numpy's and torch's."""
        return _Term(f"max({self.text}, {min:g})")


def _term(value: Any) -> _Term:
    return value if isinstance(value, _Term) else _Term(f"{value:.5g}")


def formula(index: Index) -> str:
    """The formula of an index over the names of its bands, for people."""
    written: _Term = index.evaluate({name: _Term(name) for name in index.bands})
    return written.text


@dataclass(frozen=True)
class Catalogue:
    """Some spectral indices."""

    indices: tuple[Index, ...]

    def summary(self) -> str:
        """A paragraph for each, and how to use them."""
        lines = []
        for index in self.indices:
            lines.append(f"{index.name}  {index.long_name}")
            lines.append(f"    = {formula(index)}   [{index.low:g} to {index.high:g}]")
            lines.append(f"    {index.source}")
        example = ",".join(index.name for index in self.indices[:3])
        words = (
            "Bands are the stored integers, DEM is in metres. With --index_input reflectance bands "
            "are surface reflectance clipped to 0.001-1.2, and the index is clipped to the range "
            f"in brackets. Use them as --spectral_indices {example},..."
        )
        return "\n".join([*lines, "", *textwrap.wrap(words, _WIDTH)])


def list_indices(config: IndicesConfig, progress: Progress = silent) -> Catalogue:
    """The indices asked for; all of them by default.

    Raises:
        ConfigError: no index has such a name.
    """
    return Catalogue(tuple(INDICES[name] for name in parse_indices(config.names) or INDICES))
