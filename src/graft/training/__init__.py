"""The engine: a run is a set of jobs on one frozen base; a step fuses the rows of all jobs into passes over it.

`job` is one adapter with its data, optimiser and stop rule; `forward` and `losses` turn a batch into the loss of each
supervised token; `layout` proves that token-flat batches are right for a model; `step` takes one optimiser step of all jobs;
`company` keeps the jobs from harming each other; `roster` and `scheduling` say who trains when; `parking` sets jobs aside; `engine` is
the loop; `ledger` writes down what happens, `state` the checkpoints; `parts` makes jobs from a configuration; `start` begins and
resumes runs; `checking` looks one over beforehand.
"""

from graft.training.check import check, check_each
from graft.training.start import resume, train

__all__ = ["check", "check_each", "resume", "train"]
