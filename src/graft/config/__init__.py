"""What a run is (`schema`), and how it is read and written (`loading`)."""

from graft.config.loading import dump_run, load_run, schema
from graft.config.schema import BaseConfig, DataConfig, EvalConfig, RunConfig, SourceConfig, TrainConfig

__all__ = [
    "BaseConfig",
    "DataConfig",
    "EvalConfig",
    "RunConfig",
    "SourceConfig",
    "TrainConfig",
    "dump_run",
    "load_run",
    "schema",
]
