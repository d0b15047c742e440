"""Optuna's tree-structured Parzen estimator. Its study lives in memory and is filled anew from what is known before each question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graft.errors import require
from graft.study.samplers.base import Known
from graft.study.samplers.space import Codes, Dimension, Space


class TPE:
    """Optuna's TPE, several objectives included. Choices in order are whole numbers to it, others are categories.

    Points that would not fit into memory are trials that break a constraint, so it learns where they lie.
    """

    def __init__(self, space: Space, objectives: int, seed: int) -> None:
        self.space, self.objectives, self.seed = space, objectives, seed
        self.optuna: Any = require("optuna", "search")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)

    def ask(self, known: Sequence[Known], count: int) -> list[Codes]:
        study = self._study(known)
        distributions = {each.key: self._distribution(each) for each in self.space.dimensions}
        found = []
        for _ in range(count):
            params = study.ask(distributions).params
            found.append({each.key: self._code(each, params[each.key]) for each in self.space.dimensions})
        return found

    def _study(self, known: Sequence[Known]) -> Any:
        optuna = self.optuna
        # Every question has a seed of its own: the number of points that are known.
        sampler = optuna.samplers.TPESampler(
            seed=self.seed * 100_003 + len(known),
            multivariate=True,
            constant_liar=True,
        )
        study = optuna.create_study(directions=["minimize"] * self.objectives, sampler=sampler)
        states, worst = optuna.trial.TrialState, self._worst(known)
        for each in known:
            # A point that would not fit has no value; the worst one stands in, and the constraint says that it is no point to go to.
            values = each.values if each.state == "done" else worst
            state = {"pending": states.RUNNING, "failed": states.FAIL}.get(each.state, states.COMPLETE)
            constraints = {"memory": 1.0 if each.state == "infeasible" else -1.0} if state == states.COMPLETE else None
            if state == states.COMPLETE and values is None:
                continue
            study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    params={key: self._param(key, code) for key, code in each.codes.items()},
                    distributions={one.key: self._distribution(one) for one in self.space.dimensions},
                    values=list(values) if state == states.COMPLETE and values else None,
                    constraints=constraints,
                )
            )
        return study

    def _worst(self, known: Sequence[Known]) -> tuple[float, ...] | None:
        done = [each.values for each in known if each.state == "done"]
        return tuple(max(column) for column in zip(*done, strict=True)) if done else None

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self.optuna.distributions
        if dimension.choices and not dimension.ordered:
            return kinds.CategoricalDistribution(list(range(len(dimension.choices))))
        if dimension.whole:
            return kinds.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        return kinds.FloatDistribution(float(dimension.low), float(dimension.high), log=dimension.log)

    def _param(self, key: str, code: int | float) -> int | float:
        dimension = next(each for each in self.space.dimensions if each.key == key)
        return int(code) if dimension.whole else float(code)

    def _code(self, dimension: Dimension, param: Any) -> int | float:
        return int(param) if dimension.whole else float(param)
