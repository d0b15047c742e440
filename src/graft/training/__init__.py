"""Training: a run is a set of jobs on one frozen base, and a step runs the rows of all jobs through the base together.

start, resuming, check        begin a run; resume one; check one beforehand
assembly, settings            what a run is made of, from its configuration
engine                        the loop: sessions, steps, validation
job, rows, objectives         one adapter with its data, optimiser and stop rule; its rows; what it learns from their losses
batching, step, isolation     rows to micro-batches; gradients and updates; a job that fails alone
forward/                      a batch to the loss of each target: head, layout, kernels, compiled graph, modes
job_pool, scheduling/         who is in memory, and who takes the next step
commands, interrupt           what users ask of a run while it trains
saving, checkpoints, offload  what is kept on disk of the jobs (as tensor_files)
publishing                    the adapter folders that users take
records/                      metrics, events, status, trackers, model cards
updates/                      optimisers by name, their states, schedules
validation, dry_run           validation scores; passes without an update
"""

from graft.training.check import check, check_each
from graft.training.resuming import resume
from graft.training.start import train

__all__ = ["check", "check_each", "resume", "train"]
