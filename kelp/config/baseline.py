"""Options of `kelp baseline`."""

from __future__ import annotations

from kelp.config.base import option
from kelp.config.fold import FoldConfig, FoldNumber


class BaselineConfig(FoldConfig):
    """Boosted trees that classify each pixel on its own: what a network has to beat."""

    cv_split: FoldNumber = option(0, help="Number of the validation fold", unit="fold")
    sahi: bool = option(False, help="The table is one of tiles")
    pixels_per_image: int = option(
        2000,
        help="Pixels drawn from an image or tile at most, up to half of them kelp",
        unit="pixels",
        ge=2,
    )
    trees: int = option(300, help="Trees at most", unit="trees", ge=1)
    learning_rate: float = option(
        0.1, help="What each tree adds is multiplied by this", unit="factor", gt=0, le=1
    )
    leaves: int = option(31, help="Leaves of a tree at most", unit="leaves", ge=2, le=4096)
    early_stopping_rounds: int = option(
        30,
        help="Trees without a lower loss on the validation fold's sample before stopping; "
        "0: all trees",
        unit="trees",
        ge=0,
    )
    threads: int | None = option(
        None, help="Threads of LightGBM; default: as many as torch takes", unit="threads", ge=1
    )
    seed: int = option(42, help="Seed of the drawn pixels and the trees", unit="integer", ge=0)
