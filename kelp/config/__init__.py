"""The configuration of every command: one declaration per option.

`kelp.cli` builds flags, help and validation from these classes; Python users construct them
(`kelp.config.SliceConfig(data_dir=..., ...)`) and pass them to the function of the command.
"""

from kelp.config.base import Config as Config
from kelp.config.baseline import BaselineConfig as BaselineConfig
from kelp.config.comparison import CompareConfig as CompareConfig
from kelp.config.comparison import TuneConfig as TuneConfig
from kelp.config.fold import FoldConfig as FoldConfig
from kelp.config.predict import DemoConfig as DemoConfig
from kelp.config.predict import EnsembleConfig as EnsembleConfig
from kelp.config.predict import EvaluateConfig as EvaluateConfig
from kelp.config.predict import ExportConfig as ExportConfig
from kelp.config.predict import ModelsConfig as ModelsConfig
from kelp.config.predict import PredictConfig as PredictConfig
from kelp.config.predict import PreviewConfig as PreviewConfig
from kelp.config.predict import SubmitConfig as SubmitConfig
from kelp.config.predict import VerifyConfig as VerifyConfig
from kelp.config.prep import IndicesConfig as IndicesConfig
from kelp.config.prep import MetadataConfig as MetadataConfig
from kelp.config.prep import SimulateConfig as SimulateConfig
from kelp.config.prep import SliceConfig as SliceConfig
from kelp.config.prep import SplitConfig as SplitConfig
from kelp.config.prep import StatsConfig as StatsConfig
from kelp.config.products import AreasConfig as AreasConfig
from kelp.config.products import BedsConfig as BedsConfig
from kelp.config.products import SeriesConfig as SeriesConfig
from kelp.config.products import StacConfig as StacConfig
from kelp.config.products import ViewConfig as ViewConfig
from kelp.config.reporting import ReportConfig as ReportConfig
from kelp.config.scenes import InfoConfig as InfoConfig
from kelp.config.scenes import SearchConfig as SearchConfig
from kelp.config.sweep import SweepConfig as SweepConfig
from kelp.config.train import TrainConfig as TrainConfig
