"""Objectives: what a job makes of the losses of its rows. One file each; `objective_of` makes the one that a run asks for.

A job's loss is a sum over its rows divided by counts of the whole step, so the shares of micro-batches add up to it.
"""

from __future__ import annotations

from graft.config import DPOConfig, IPOConfig, KTOConfig, ObjectiveConfig
from graft.config.objectives import ConsistencyConfig, Reference
from graft.config.policies import PolicyConfig
from graft.training.objectives.consistency import Consistency as Consistency
from graft.training.objectives.marked import Marked as Marked
from graft.training.objectives.policy import Policy as Policy
from graft.training.objectives.preference import Pairs as Pairs
from graft.training.objectives.preference import Preference as Preference
from graft.training.objectives.supervised import Scores as Scores
from graft.training.objectives.supervised import Size as Size
from graft.training.objectives.supervised import Supervised as Supervised

Objective = Supervised | Preference | Marked


def objective_of(config: ObjectiveConfig | None) -> Objective:
    """Make the objective that `train.objective` describes."""
    if isinstance(config, KTOConfig):
        return Marked(config)
    if isinstance(config, ConsistencyConfig):
        return Consistency(config)
    if isinstance(config, PolicyConfig):
        return Policy(config)
    return Supervised() if config is None else Preference(config)


def reference_of(config: ObjectiveConfig | None) -> Reference | None:
    """What the objective compares answers with: "base" or "init", or None where it compares with nothing."""
    return config.reference if isinstance(config, DPOConfig | IPOConfig | KTOConfig) else None
