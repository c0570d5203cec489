"""Options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from kelp.config.base import Config, Names, option
from kelp.config.choices import Checkpoint, Device, Precision
from kelp.raster.bands import IndexInput

if TYPE_CHECKING:
    from kelp.raster.indices import IndexSettings

_TABLE_HELP: Final = "Table of kelp metadata, or of kelp slice"


class BandOrderOptions(Config):
    """Which band is which in the files."""

    band_order: Names = option(
        (), help="Band names of the files, comma-separated; default: read from the files"
    )


class WorkerOptions(Config):
    """How many processes work, or which cluster does."""

    workers: int = option(
        0,
        help="Worker processes; 0: one for each core. The result does not depend on it",
        unit="processes",
        ge=0,
    )


class SchedulerOptions(Config):
    """Which cluster works."""

    scheduler: str | None = option(
        None,
        help="Work on a Dask cluster: local, local:N, the address of a scheduler "
        "(tcp://host:8786), or its scheduler file; default: on this machine. The result does not "
        "depend on it",
    )


class TableOptions(Config):
    """The rows to work on."""

    metadata_fp: Path = option(help=_TABLE_HELP, resumable=True)


class OptionalTableOptions(Config):
    """The rows to work on, where there is a table."""

    metadata_fp: Path | None = option(None, help=f"{_TABLE_HELP}; needed for --cv_split")


class SiteOptions(Config):
    """Which scenes show the same site."""

    metadata_fp: Path | None = option(
        None,
        help="Table of kelp metadata: which scenes show the same site; default: that of the "
        "fold where the scenes are the fold's, else each scene is a site of its own",
    )


class BootstrapOptions(SiteOptions):
    """Confidence intervals by resampling sites."""

    draws: int = option(2000, help="Bootstrap draws of sites", unit="draws", ge=100)
    seed: int = option(0, help="Seed of the draws", unit="integer", ge=0)


class PixelSizeOptions(Config):
    """Areas of masks without georeference."""

    pixel_size: float = option(
        30.0, help="Side of a pixel where a mask has no CRS, for areas", unit="m", gt=0
    )


class GridOptions(Config):
    """Rasters that are laid on each other."""

    ignore_georeference: bool = option(
        False,
        help="Lay rasters of one size on each other, wherever their georeferences say they lie",
    )


class TruthOptions(GridOptions):
    """True masks."""

    kelp_value: int = option(
        1, help="Value of kelp in the true masks, where it is not 1", unit="1-255", ge=1, le=255
    )


class ThresholdOptions(Config):
    """Where probabilities become kelp."""

    decision_threshold: float | None = option(
        None,
        help="Kelp where the probability is at least this; default: of predict the bundle's, of "
        "ensemble 0.5, of compare fitted for each site on the others",
        unit="0-1",
        ge=0,
        le=1,
    )


class QaOptions(Config):
    """What the QA band means for a pixel."""

    qa_as_nodata: bool = option(
        True, help="Pixels with QA = 1 are not observed (255); False: only missing data is"
    )


class CheckpointOptions(Config):
    """Which weights of a run."""

    use_checkpoint: Checkpoint = option("best", help="Which bundle of a run")


class DeviceOptions(Config):
    """Where a network runs."""

    device: Device = option("auto", help="Where the network runs", resumable=True)


class NetworkOptions(CheckpointOptions, DeviceOptions):
    """How trained networks are run."""

    precision: Precision | None = option(
        None, help="Number format; default: bf16-mixed where the device has it, else 32-true"
    )
    batch_size: int | None = option(
        None,
        help="Crops in a batch; default: 8, on a CPU fewer of more than 224 x 224 px",
        unit="crops",
        ge=1,
    )


class IndexOptions(Config):
    """Spectral indices: which, and how they are computed."""

    spectral_indices: Names = option(
        (), help="Spectral indices added as channels, comma-separated; `all`, or `none`"
    )
    index_input: IndexInput = option(
        "dn", help="Compute indices on raw integers (dn) or on clipped surface reflectance"
    )
    mask_using_qa: bool = option(True, help="Index channels are missing where QA = 1")
    mask_using_water_mask: bool = option(True, help="Index channels are missing on land (DEM > 0)")
    fill_missing_pixels_with_torch_nan: bool = option(
        True, help="Missing values become their channel's minimum; False: 0"
    )

    @property
    def index_settings(self) -> IndexSettings:
        """Index input and masks."""
        from kelp.raster.indices import IndexSettings  # imports numpy, which --help need not

        return IndexSettings(self.index_input, self.mask_using_qa, self.mask_using_water_mask)
