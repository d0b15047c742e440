"""The engine: a run is a set of jobs on one frozen base; a step fuses the rows of all jobs into passes over it.

`job` is one adapter with its data, optimiser and stop rule; `forward` and `losses` turn a batch into the loss of each
supervised token; `layout` proves that token-flat batches are right for a model; `step` takes one optimiser step of all jobs;
`engine` is the loop; `state` writes and reads checkpoints; `start` makes a run from its configuration;
`checking` looks one over beforehand.
"""

from graft.training.checking import check
from graft.training.start import resume, train

__all__ = ["check", "resume", "train"]
