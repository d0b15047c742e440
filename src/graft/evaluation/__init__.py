"""Answers and scores: generation for many prompts and adapters at once, comparison with references, statistics.

`requests` says what is to be generated and cuts it into batches; `generation` and `beams` generate; `selfcheck` proves that
batches change nothing; `answers` compares; `statistics` puts intervals on scores; `loss` measures the loss; `contestants`
are the base and the adapters that are measured; `datafile` evaluates them on a data file.
"""

from graft.evaluation.evaluating import evaluate, evaluate_on

__all__ = ["evaluate", "evaluate_on"]
