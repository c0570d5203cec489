"""`kelp indices`: the spectral indices as text, formulas without needless brackets."""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass
from typing import Final

from kelp.config import IndicesConfig
from kelp.progress import Progress, silent
from kelp.raster.indices import INDICES, Index, parse_indices

_WIDTH: Final = 100
_SUM, _QUOTIENT, _PRODUCT, _ATOM = range(4)  # how tightly a part of a formula holds together
_SIGNS: Final[dict[type[ast.operator], tuple[str, int, int, int]]] = {
    ast.Add: (" + ", _SUM, _SUM, _SUM),
    ast.Sub: (" - ", _SUM, _SUM, _QUOTIENT),
    ast.Mult: (" ", _PRODUCT, _PRODUCT, _PRODUCT),
    ast.Div: (" / ", _QUOTIENT, _PRODUCT, _ATOM),
}
"""What stands between two parts, how tightly the whole holds, and from where on the left and the
right part need no brackets."""


def formula(index: Index) -> str:
    """The formula of an index over the names of its bands, for people."""
    return _written(ast.parse(index.formula, mode="eval").body)[0]


def _written(node: ast.expr) -> tuple[str, int]:
    """A part of a formula, and how tightly it holds together."""
    match node:
        case ast.Constant(int() | float() as number):
            return f"{number:.5g}", _ATOM
        case ast.BinOp(left, operation, right):
            sign, tight, *least = _SIGNS[type(operation)]
            parts = [
                text if holds >= enough else f"({text})"
                for (text, holds), enough in zip(map(_written, (left, right)), least, strict=True)
            ]
            return sign.join(parts), tight
    return ast.unparse(node), _ATOM


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
