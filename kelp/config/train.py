"""Options of `kelp train`, spelled as the original system's, and of `kelp sweep`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from kelp.config.base import Config, Floats, Integers, option
from kelp.config.choices import (
    Architecture,
    CompileMode,
    Interpolation,
    Loss,
    Metric,
    Normalization,
    Optimizer,
    Precision,
    ResizeStrategy,
    Scheduler,
)
from kelp.config.fold import FoldConfig, number
from kelp.config.shared import DeviceOptions
from kelp.errors import ConfigError
from kelp.raster.bands import Anchoring

Devices = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(number)]


def _by_sahi(whole: Any, sliced: Any) -> Callable[[dict[str, Any]], Any]:
    """A default for whole images, and one for tiles: the recipe that docs/experiments.md found."""
    # `sahi` is absent where it was refused itself.
    return lambda options: sliced if options.get("sahi") else whole


def _best(metric: str) -> Literal["max", "min"]:
    return "min" if metric == "val/loss" else "max"


class TrainConfig(FoldConfig, DeviceOptions):
    """One training run: tracked in MLflow, ending in a bundle."""

    # data
    batch_size: int = option(
        32,
        help="Crops in a batch of each process: a step sees --devices x --num_nodes x "
        "--accumulate_grad_batches times as many",
        unit="crops",
        ge=1,
    )
    pack: bool = option(
        True,
        help="Decode each image once, into <output_dir>/packed, for this and later runs",
        resumable=True,
    )
    augment: bool = option(
        True, help="Turn and mirror training crops: the 8 symmetries of the square"
    )
    augment_offset: float = option(
        0.0,
        help="Lift and lower the optical bands of training crops, as haze and glint do: "
        "standard deviation",
        unit="reflectance",
        ge=0,
        le=1,
    )
    augment_gain: float = option(
        0.0,
        help="Multiply the optical bands of training crops: standard deviation of the "
        "factor's logarithm",
        unit="factor",
        ge=0,
        le=1,
    )
    augment_noise: float = option(
        0.0,
        help="Noise on each pixel of training crops: standard deviation",
        unit="reflectance",
        ge=0,
        le=1,
    )
    augment_dropout: float = option(
        0.0,
        help="Chance of an optical band to be missing all over a training crop",
        unit="fraction 0-1",
        ge=0,
        lt=1,
    )
    random_crops: bool = option(
        default_of=_by_sahi(whole=False, sliced=True),
        help="With --sahi: shift training tiles by up to half a tile from their position in the "
        "table, within the images they are from; default: with --sahi True, else False",
    )

    # preprocessing
    image_size: int = option(
        default_of=_by_sahi(whole=352, sliced=224),
        help="Side of the network's input; default: 352, with --sahi 224",
        unit="px",
        ge=32,
    )
    resize_strategy: ResizeStrategy = option(
        default_of=_by_sahi(whole="pad", sliced="resize"),
        help="Bring images to image_size by padding or resizing; default: pad, with --sahi resize",
    )
    interpolation: Interpolation = option(
        default_of=_by_sahi(whole="nearest", sliced="bilinear"),
        help="How --resize_strategy resize resamples; default: nearest, with --sahi bilinear",
    )
    anchoring: Anchoring = option(
        "local",
        help="Shift the optical bands of each image to where its clear water has fixed levels, at "
        "prediction too: by one number each (constant), or by what the water around says (local)",
    )
    normalization_strategy: Normalization = option(
        default_of=lambda options: "quantile" if options.get("anchoring") == "none" else "water",
        help="Scale channels by q01-q99, by mean and deviation, or by min-max; water: optical "
        "bands by their distance to clear water; per-sample-…: by the range of each tile or image "
        "alone, at prediction too; default: water, without --anchoring quantile",
    )

    # sampling
    use_weighted_sampler: bool = option(
        False, help="Draw tiles by the weights below; False: each row once an epoch"
    )
    samples_per_epoch: int = option(
        10240, help="Tiles drawn in an epoch of the weighted sampler", unit="tiles", ge=1
    )
    has_kelp_importance_factor: float = option(1.0, help="Weight of: has kelp", unit="factor")
    kelp_pixels_pct_importance_factor: float = option(
        1.0, help="Weight of: 1 - share of kelp pixels", unit="factor"
    )
    qa_ok_importance_factor: float = option(
        1.0, help="Weight of: no pixel with QA = 1", unit="factor"
    )
    qa_corrupted_pixels_pct_importance_factor: float = option(
        1.0, help="Weight of: 1 - share of pixels with QA = 1", unit="factor"
    )
    almost_all_water_importance_factor: float = option(
        1.0, help="Weight of: 1 - share of water pixels", unit="factor"
    )
    dem_nan_pixels_pct_importance_factor: float = option(
        1.0, help="Weight of: 1 - share of pixels with unknown DEM", unit="factor"
    )
    dem_zero_pixels_pct_importance_factor: float = option(
        1.0, help="Weight of: 1 - share of pixels with DEM = 0", unit="factor"
    )

    # network
    architecture: Architecture = option("unet", help="Decoder, of segmentation_models_pytorch")
    encoder: str = option("tu-efficientnet_b5", help="Encoder: any of timm as tu-<name>")
    pretrained: bool = option(True, help="Start from --encoder_weights; False: random weights")
    encoder_weights: str = option(
        "imagenet", help="`imagenet`, or a file of the encoder's weights (.safetensors, .pth)"
    )
    decoder_channels: Integers = option(
        (256, 128, 64, 32, 16),
        help="Channels of the decoder's stages; as many as the encoder is deep",
        unit="channels",
    )
    decoder_attention_type: Literal["scse", "none"] = option(
        "none", help="Attention in the decoder (unet, unet++)"
    )

    # optimisation
    loss: Loss = option("dice", help="Loss function")
    ce_smooth_factor: float = option(
        0.0, help="Label smoothing of ce, soft_ce, bce, combo", unit="fraction 0-1", ge=0, lt=0.5
    )
    ce_class_weights: Floats = option(
        (1.0, 1.0), help="Weights of background and kelp in ce, bce and combo", unit="factors"
    )
    optimizer: Optimizer = option("adamw", help="Optimizer")
    lr: float = option(3e-4, help="Learning rate (its maximum)", unit="per step", gt=0)
    weight_decay: float = option(1e-4, help="Weight decay", unit="factor", ge=0)
    lr_scheduler: Scheduler = option("none", help="Course of the learning rate")
    onecycle_pct_start: float = option(
        0.1, help="Share of the steps that onecycle climbs", unit="fraction 0-1", gt=0, lt=1
    )
    onecycle_div_factor: float = option(
        2.0, help="onecycle starts at lr divided by this", unit="factor", gt=0
    )
    onecycle_final_div_factor: float = option(
        100.0, help="onecycle ends at its start divided by this", unit="factor", gt=0
    )
    lr_cycle_epochs: int = option(
        2,
        help="Length of a cycle of cyclic, and of the first of cosine_with_warm_restarts",
        unit="epochs",
        ge=1,
    )
    lr_cycle_factor: int = option(
        1,
        help="Each cycle of cosine_with_warm_restarts is longer than the last by this",
        unit="factor",
        ge=1,
    )
    lr_plateau_patience: int = option(
        2,
        help="Epochs without a better --monitor_metric that reduce_lr_on_plateau bears",
        unit="epochs",
        ge=0,
    )
    lr_plateau_factor: float = option(
        0.3,
        help="reduce_lr_on_plateau then multiplies the rate by this",
        unit="factor",
        gt=0,
        lt=1,
    )
    epochs: int = option(10, help="Epochs at most", unit="epochs", ge=1)
    precision: Precision = option(
        "bf16-mixed", help="Number format; one that the device lacks falls back with a notice"
    )
    accumulate_grad_batches: int = option(
        1, help="Batches whose gradients make one step", unit="batches", ge=1
    )
    swa: bool = option(
        False, help="Average the weights of the epochs from --swa_epoch_start on (SWA)"
    )
    swa_epoch_start: float = option(
        0.75,
        help="First epoch of the average: its number; below 1, the share of epochs before",
        unit="epoch or fraction",
        ge=0,
    )
    swa_lr: float = option(
        3e-5, help="Learning rate while weights are averaged by --swa", unit="per step", gt=0
    )
    swa_annealing_epochs: int = option(
        2, help="Epochs in which the rate moves to --swa_lr", unit="epochs", ge=0
    )
    ema_decay: float = option(
        0.0,
        help="Keep a moving average of the weights, which this decays in a step, for example "
        "0.999; 0: none",
        unit="fraction 0-1",
        ge=0,
        lt=1,
    )

    compile: bool = option(
        False, help="Compile the network with torch.compile: slower to start, then faster"
    )
    compile_mode: CompileMode = option("default", help="Mode of torch.compile")

    # selection
    monitor_metric: Metric = option("val/dice", help="Metric that picks the best epoch")
    monitor_mode: Literal["max", "min"] = option(
        default_of=lambda options: _best(options.get("monitor_metric", "")),
        help="Whether more or less of --monitor_metric is better: default, as it is",
    )
    min_dice: float = option(
        0.05,
        help="End in an error, without a bundle, where the best epoch finds less on its "
        "validation rows, at the best threshold; 0: keep any network",
        unit="fraction 0-1",
        ge=0,
        lt=1,
        resumable=True,
    )
    calibrate: bool = option(
        True,
        help="At the end fit threshold, temperature, errors of areas and the guard on the images "
        "that the fold holds out, as `kelp tune` does",
        resumable=True,
    )
    save_top_k: int = option(1, help="Bundles of the best epochs to keep", unit="bundles", ge=1)
    early_stopping_patience: int = option(
        10,
        help="Epochs without a better metric before stopping",
        unit="epochs",
        ge=1,
        resumable=True,
    )
    limit_train_batches: int | None = option(
        None, help="Batches of an epoch at most; default: all", unit="batches", ge=1
    )
    limit_val_batches: int | None = option(
        None, help="Validation batches at most; default: all", unit="batches", ge=1
    )
    limit_test_batches: int | None = option(
        None,
        help="Taken for the sake of older command lines: training has no test pass",
        unit="batches",
        ge=1,
        resumable=True,
    )
    val_check_interval: float = option(
        1.0,
        help="Validate each time this share of an epoch is done; epochs are ranked at their "
        "ends all the same",
        unit="fraction 0-1",
        gt=0,
        le=1,
    )
    log_every_n_steps: int = option(
        50,
        help="Optimizer steps between points of the curves train/loss_step, lr_step; 0: none",
        unit="steps",
        ge=0,
        resumable=True,
    )
    plot_n_batches: int = option(
        1,
        help="Sets of six validation samples to picture: the first at each epoch, all with the "
        "best network; 0: none",
        unit="sets",
        ge=0,
        resumable=True,
    )
    fast_dev_run: bool = option(False, help="Two batches of each kind only, to try a setting")

    # run
    resume_from: Path | None = option(
        None, help="Run folder of a stopped run, which is resumed", resumable=True
    )
    devices: Devices = option(
        1,
        help="Processes on each machine, each with a GPU of its own (or a share of the CPU); "
        "`auto`: one for each GPU",
        unit="processes",
    )
    num_nodes: int = option(
        1, help="Machines; more than one are started by torchrun or srun", unit="machines", ge=1
    )
    strategy: Literal["auto", "ddp"] = option(
        "auto",
        help="How processes work together: ddp, torch's DistributedDataParallel; auto: ddp "
        "where there are several",
        resumable=True,
    )
    seed: int = option(42, help="Seed of weights, sampling and augmentation", unit="integer", ge=0)

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        self._averages_fit()
        if self.random_crops and not self.sahi:
            raise ConfigError("--random_crops True: only tiles can be moved; add --sahi True")
        better = _best(self.monitor_metric)
        if self.monitor_mode != better:
            raise ConfigError(
                f"--monitor_mode {self.monitor_mode}: of {self.monitor_metric} the {better}imum "
                f"is best; give --monitor_mode {better}"
            )
        if len(self.ce_class_weights) != 2 or min(self.ce_class_weights) <= 0:
            raise ConfigError("--ce_class_weights: two positive numbers, background and kelp")
        if self.image_size % 32:
            raise ConfigError(
                f"--image_size {self.image_size} px: networks need a multiple of 32, "
                f"for example {-(-self.image_size // 32) * 32}"
            )
        return self

    @property
    def first_averaged_epoch(self) -> int:
        """The epoch, counted from 0, from which `--swa` averages."""
        start = self.swa_epoch_start
        return int(start * self.epochs) if start < 1 else math.ceil(start) - 1

    def _averages_fit(self) -> None:
        if self.swa and self.ema_decay:
            raise ConfigError("--swa True and --ema_decay: two averages of one network; keep one")
        if self.swa and self.first_averaged_epoch >= self.epochs:
            raise ConfigError(
                f"--swa_epoch_start {self.swa_epoch_start:g}: the run has {self.epochs} epochs; "
                "start earlier"
            )
        if (self.swa or self.ema_decay) and self.precision in ("16-true", "bf16-true"):
            mixed = self.precision.replace("true", "mixed")
            raise ConfigError(
                f"--precision {self.precision}: 16 bits cannot hold an average of weights; "
                f"give --precision {mixed}"
            )


Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["median", "none"]


class SweepConfig(Config):
    """A search for better options of kelp train: many runs, with other options each."""

    train_config: Path = option(help="Config file of kelp train: what all trials share")
    space: Path = option(help="YAML file of the options to search, with their ranges or values")
    output_dir: Path = option(
        help="Folder for the runs, mlflow.db, study.db, trials.csv, best.yaml and report.html; "
        "a sweep that was started there is resumed"
    )
    trials: int = option(
        20, help="Trials to finish, those of earlier calls included", unit="trials", ge=1
    )
    timeout: float | None = option(
        None, help="Start no trial after this time; default: no limit", unit="seconds", gt=0
    )
    sampler: Sampler = option(
        "tpe",
        help="How options are chosen: from what scored well (tpe), at random, or all combinations",
    )
    pruner: Pruner = option(
        "median", help="End trials that do worse than the median of those before at the same epoch"
    )
    seed: int = option(
        0, help="Seed of the choices; that of training is in the config file", unit="integer", ge=0
    )
