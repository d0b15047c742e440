"""The configuration of a run: one module per block of the YAML; `loading` reads and writes it, `jobs` is for runs of several jobs."""

from graft.config.base import BaseConfig
from graft.config.data import DataConfig, SourceConfig
from graft.config.distributed import DistributedConfig
from graft.config.eval import EvalConfig
from graft.config.jobs import AnyRun, JobConfig, JobsConfig, resolve_job
from graft.config.loading import dump_run, load_job, load_run, schema
from graft.config.objectives import (
    OBJECTIVES,
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    ObjectiveConfig,
    ORPOConfig,
    SimPOConfig,
)
from graft.config.paths import local_paths, lost_paths, relocate
from graft.config.run import RunConfig
from graft.config.scheduling import HalvingConfig, SchedulerConfig
from graft.config.train import TrainConfig

__all__ = [
    "AnyRun",
    "OBJECTIVES",
    "BaseConfig",
    "CPOConfig",
    "DPOConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "HalvingConfig",
    "IPOConfig",
    "JobConfig",
    "JobsConfig",
    "KTOConfig",
    "ORPOConfig",
    "ObjectiveConfig",
    "RunConfig",
    "SchedulerConfig",
    "SimPOConfig",
    "SourceConfig",
    "TrainConfig",
    "dump_run",
    "load_job",
    "load_run",
    "local_paths",
    "lost_paths",
    "relocate",
    "schema",
    "resolve_job",
]
