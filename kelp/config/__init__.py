"""The configuration of every command: one declaration per option.

`kelp.cli` builds flags, help and validation from these classes; Python users construct them
(`kelp.config.SliceConfig(data_dir=..., ...)`) and pass them to the function of the command.
"""

from kelp.config.base import Config
from kelp.config.baseline import BaselineConfig
from kelp.config.comparison import CompareConfig, TuneConfig
from kelp.config.fold import FoldConfig
from kelp.config.predict import (
    DemoConfig,
    EnsembleConfig,
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
    PreviewConfig,
    SubmitConfig,
)
from kelp.config.prep import (
    IndicesConfig,
    MetadataConfig,
    SimulateConfig,
    SliceConfig,
    SplitConfig,
    StatsConfig,
)
from kelp.config.products import AreasConfig, BedsConfig
from kelp.config.reporting import ReportConfig
from kelp.config.scenes import InfoConfig, SceneOptions, SearchConfig
from kelp.config.sweep import SweepConfig
from kelp.config.train import TrainConfig

__all__ = [
    "AreasConfig",
    "BaselineConfig",
    "BedsConfig",
    "CompareConfig",
    "Config",
    "DemoConfig",
    "EnsembleConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FoldConfig",
    "IndicesConfig",
    "InfoConfig",
    "MetadataConfig",
    "PredictConfig",
    "PreviewConfig",
    "ReportConfig",
    "SceneOptions",
    "SearchConfig",
    "SimulateConfig",
    "SliceConfig",
    "SplitConfig",
    "StatsConfig",
    "SubmitConfig",
    "SweepConfig",
    "TrainConfig",
    "TuneConfig",
]
