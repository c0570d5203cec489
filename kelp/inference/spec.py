"""What describes a network and a bundle, as data: everything prediction needs but the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kelp.config.choices import Architecture, Interpolation, Normalization, ResizeStrategy
from kelp.evaluation.intervals import HeldOutSite
from kelp.inference.guard import GuardLimits
from kelp.raster.bands import OPTICAL, Anchoring, IndexInput
from kelp.raster.indices import IndexSettings, channel_names
from kelp.raster.streaming import ChannelStats
from kelp.raster.water import WATER_LEVELS, WaterReference
from kelp.raster.window import RasterSource, Shape, Tile

SCHEMA_VERSION: Final = 1
STRIDE: Final = 32
"""Networks take sides that are multiples of this."""
LARGEST_SIDE: Final = 16_384
"""No network is shown more pixels a side: such a number is an error, and memory would be asked for
before anyone could say so."""
TREES: Final = "lightgbm"
"""The architecture of `kelp baseline`."""

Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
"""Pixels of a side."""


class NetworkSpec(BaseModel):
    """How raw digital numbers become probabilities; see `kelp.nn.model.KelpNet`.

    Also of boosted trees (`kelp.inference.backends.trees.PixelTrees`), which ignore all sizes.
    Defaults are those of `kelp train`; what has one here came after the first bundles.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bands: tuple[str, ...] = Field(min_length=1)
    spectral_indices: tuple[str, ...]
    index_input: IndexInput
    mask_using_qa: bool
    mask_using_water_mask: bool
    fill_missing_pixels_with_torch_nan: bool
    normalization_strategy: Normalization
    anchoring: Anchoring = "none"  # of bundles that know nothing of it
    """How a scene's optical bands are shifted so that its clear water has `water_levels`."""
    water_levels: Annotated[
        tuple[Annotated[float, Field(gt=0, le=65_535)], ...],
        Field(min_length=len(OPTICAL), max_length=len(OPTICAL)),
    ] = WATER_LEVELS
    """DN of clear water, bands in the order of `kelp.raster.bands.OPTICAL`."""
    statistics: dict[str, ChannelStats]
    """Of each channel, in raw units: DN for bands, index units for indices; of scenes as they are,
    before any anchoring."""

    sahi: bool
    """Trained on tiles and to be applied in tiles of `tile_size`."""
    tile_size: tuple[Side, Side]
    """Height and width of a training image or tile, in its own pixels."""
    prediction_tile: Side | None = None
    """Side of the tiles that prediction cuts, shown at the training's scale; None: `tile_size`."""
    prediction_overlap: int | None = Field(None, ge=0, le=LARGEST_SIDE)
    """Overlap of neighbouring tiles at prediction; None: half a tile."""
    image_size: Side
    """Side of the network's input, in pixels."""
    resize_strategy: ResizeStrategy
    interpolation: Interpolation

    architecture: Architecture | Literal["lightgbm"]
    encoder: str
    decoder_channels: tuple[Annotated[int, Field(ge=1, le=4096)], ...]
    decoder_attention_type: Literal["scse", "none"]

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this: `kelp train` and `kelp tune` fit it, so that probabilities mean
    what they say."""

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        for name, stats in self.statistics.items():
            if wrong := stats.wrong():
                raise ValueError(f"statistics of {name}: {wrong}")
        if not self.is_pixelwise and self.image_size % STRIDE:
            raise ValueError(f"image_size {self.image_size} is no multiple of {STRIDE}")
        tile = self.prediction_tile or min(self.tile_size)
        if self.prediction_overlap is not None and self.prediction_overlap >= tile:
            raise ValueError(f"prediction_overlap {self.prediction_overlap} leaves no step")
        return self

    @property
    def index_settings(self) -> IndexSettings:
        """Index input and masks."""
        return IndexSettings(self.index_input, self.mask_using_qa, self.mask_using_water_mask)

    def reference(
        self, source: RasterSource, windows: Sequence[Tile] | None = None
    ) -> WaterReference:
        """The water reference of a scene, which is read once for it; not, without anchoring.

        `windows`: see `WaterReference.estimate`.
        """
        return WaterReference.estimate(source, self.anchoring, self.water_levels, windows)

    def network_shape(self, tile: Shape) -> Shape:
        """What the network sees of a tile, `(height, width)` in its own pixels."""
        if self.is_pixelwise:
            return tile
        if self.resize_strategy == "resize":
            return Shape(self.image_size, self.image_size)
        side = self.image_size if tile == self.tile_size else 0
        return Shape(*(max(side, -(-size // STRIDE) * STRIDE) for size in tile))

    @property
    def is_pixelwise(self) -> bool:
        """Whether each pixel is classified on its own, so that tiles make no difference."""
        return self.architecture == TREES

    @property
    def scale(self) -> float:
        """Network pixels for each scene pixel, along a side, as trained."""
        resized = self.resize_strategy == "resize"
        return self.image_size / max(self.tile_size) if resized else 1.0

    def at_scale(self, tile: int, scale: float | None = None) -> Self:
        """The same network for tiles of `tile` pixels, shown `scale` times as large.

        Default: as large as in training. Sides are rounded up to what networks take.
        """
        scale = self.scale if scale is None else scale
        return self.model_copy(
            update={
                "tile_size": (tile, tile),
                "image_size": -(-round(tile * scale) // STRIDE) * STRIDE,
                "resize_strategy": "pad" if scale == 1 else "resize",
            }
        )

    def of_one_tile(self) -> Self:
        """The same network for the tiles that prediction cuts, as its own size."""
        if not self.prediction_tile:
            return self
        return self.at_scale(self.prediction_tile).model_copy(update={"prediction_tile": None})

    @property
    def channels(self) -> tuple[str, ...]:
        """The network's input channels: bands, then indices."""
        return channel_names(self.bands, self.spectral_indices)


class BundleSpec(NetworkSpec):
    """`bundle.json`: the network and where it comes from."""

    def network(self) -> dict[str, Any]:
        """What the answers of the network depend on, beside its weights, as JSON."""
        return self.model_dump(mode="json", include=set(NetworkSpec.model_fields))

    schema_version: Literal[1] = SCHEMA_VERSION
    threshold: float = Field(0.5, ge=0, le=1)
    """Kelp where the probability is at least this."""
    tuning: dict[str, Any] = {}
    """What threshold and temperature were fitted on, and what they gain; empty: nothing."""
    held_out_sites: tuple[HeldOutSite, ...] = ()
    """Areas of scenes, true and mapped, with thresholds fitted on other sites: for intervals."""
    scores: dict[str, float] = {}
    """Of the validation fold, at the epoch of these weights."""
    epoch: int = Field(0, ge=0)
    """Of boosted trees: how many they are."""
    stats_file: str | None = None
    """Name of the statistics file the run was given."""
    rows: dict[str, int] = {}
    """Of the table: how many it was trained on (`train`) and validated on (`val`)."""
    training: dict[str, Any] = {}
    """The run's resolved configuration."""
    versions: dict[str, str] = {}
    weights_sha256: str = ""
    guard: GuardLimits | None = None
    """What maps of held-out scenes looked like; None: no map is checked."""
    sensors: tuple[str, ...] = ()
    """What it was made for, as in "Landsat 8"."""
    limits: tuple[str, ...] = ()
    """What a user must know of it, a sentence each."""
