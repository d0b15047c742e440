"""The YAML of a study: a base run, the settings that its trials vary, and how trials are judged.

run: run.yaml                                # or the run itself, as a mapping
seeds: [0, 1, 2]
list:                                        # whole settings, one mapping per variant
  - {adapter: {kind: lora, rank: 8}}
  - {adapter: {kind: series, bottleneck: 16}}
grid: {train.lr: [1e-3, 3e-3]}               # every variant with every learning rate
tune: [train.lr]                             # the report compares variants, each at its best learning rate
objective: test_accuracy
test: heldout.jsonl
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from graft.config.section import Place, Section

Values = Annotated[list[Any], Field(min_length=1)]
"""The values that a key takes, in order."""
Mappings = list[dict[str, Any]]
Seeds = Annotated[list[int], Field(min_length=1)]
Keys = list[str]
Names = str | Annotated[list[str], Field(min_length=1)]
"""Types with names, since a study has a key `list`."""


class RangeConfig(Section):
    """A dimension of the search: numbers between two bounds, or given values as multiples of another key's value."""

    low: int | float | None = None
    """Smallest number."""
    high: int | float | None = None
    """Largest number."""
    log: bool = False
    """Whether equal ratios count as equal distances, as for learning rates."""
    values: Values | None = None
    """Choices, in place of `low` and `high`."""
    times: str | None = None
    """A key of the space whose value is multiplied by the chosen one: alpha as a multiple of the rank."""

    @model_validator(mode="after")
    def _bounds_or_values(self) -> RangeConfig:
        if (self.values is None) == (self.low is None) or (self.low is None) != (self.high is None):
            raise ValueError("must have low and high, or values")
        if self.values is not None and self.log:
            raise ValueError("log has no effect on values: it is for low and high")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError(f"low must be smaller than high; given: {self.low} and {self.high}")
            if self.log and self.low <= 0:
                raise ValueError(f"low must be greater than 0 with log; given: {self.low}")
        if self.times is not None and not all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in self.values or ()
        ):
            raise ValueError("times multiplies numbers, so values must be numbers")
        return self


def _range(value: Any) -> Any:
    """A list stands for its choices."""
    return {"values": value} if isinstance(value, list) else value


Dimension = Annotated[RangeConfig, BeforeValidator(_range)]


class PrunerConfig(Section):
    """Which trials end before their last step."""

    kind: Literal["none", "halving", "median"]
    """halving: at each rung the worst trials of a joint run end; median: a trial ends whose validation loss is above the median of the
    others at the same step; none: all trials run to their end."""
    rungs: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """For halving: the steps at which trials are compared."""
    keep: float = Field(default=0.5, gt=0, lt=1)
    """For halving: the share that goes on at a rung."""
    after: int = Field(default=1, ge=1)
    """For median: the first step at which a trial may end."""
    least: int = Field(default=4, ge=2)
    """For median: the number of trials that must have been validated at a step before one may end there."""

    @model_validator(mode="after")
    def _settings_of_its_kind(self) -> PrunerConfig:
        own = {"none": (), "halving": ("rungs", "keep"), "median": ("after", "least")}[self.kind]
        for key in sorted(self.model_fields_set - {"kind", *own}):
            raise ValueError(f"pruner {self.kind} has no setting '{key}'; it has {', '.join(own) or 'none'}")
        if self.kind == "halving" and not self.rungs:
            raise ValueError("pruner halving needs rungs: the steps at which trials are compared, such as [50, 100]")
        return self


def _pruner(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class SearchConfig(Section):
    """A black-box search: which points it may try, how many, and who proposes them."""

    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Dotted keys of the run, each with a list of choices, or {low, high, log}. Numbers in a list, in rising order, count as ordered."""
    budget: int = Field(ge=1)
    """Number of points to try. Each is one trial per seed."""
    sampler: Literal["optuna", "nomad", "random"] = "optuna"
    """Who proposes points: Optuna's TPE, NOMAD (mesh adaptive direct search), or chance."""
    batch: int = Field(default=8, ge=1)
    """Points that are proposed together, and so share passes of the base. A smaller number learns more from each trial."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the sampler."""
    start: Mappings = Field(default_factory=list)
    """Points to try first, as mappings from the keys of the space to values."""
    warm_start: bool = False
    """Whether a point starts from the adapter of the best trial so far whose `adapter` says the same, where there is one, and goes on from
    it with its own settings, in place of a fresh adapter."""


class ProblemsConfig(Section):
    """Arithmetic word problems that Graft writes into the study folder: data for the embedded base."""

    train: int = Field(default=2000, ge=1)
    """Training rows."""
    validation: int = Field(default=64, ge=0)
    """Rows of the validation data. No row is in two of the three files, and the held-out two share no numbers with the first."""
    test: int = Field(default=200, ge=0)
    """Rows that no trial trains or validates on."""


class StudyConfig(Section):
    """Trials of one base run that differ in some settings, trained together where they can be, and compared."""

    run: Place | dict[str, Any]
    """The YAML of a run, or the run itself. Trials change settings of it."""
    seeds: Seeds = Field(default_factory=lambda: [0])
    """Values of train.seed: each point is one trial per seed."""
    grid: dict[str, Values] = Field(default_factory=dict)
    """Dotted keys with their values; every combination is a point."""
    zip: dict[str, Values] = Field(default_factory=dict)
    """Dotted keys with values that belong together: the first values are one point, the second ones another."""
    search: SearchConfig | None = None
    """A black-box search in place of grid, zip and list."""
    budget: int | None = Field(default=None, ge=1)
    """Most points that grid, zip and list may make; null is no limit."""
    tune: Keys = Field(default_factory=list)
    """Keys that every variant may choose for itself: the report compares variants at their best values."""
    tune_by: str = "validation_loss"
    """What chooses the values of `tune`, on other rows than those of the objective."""
    objective: Names = "validation_loss"
    """What trials are judged by: validation_loss, validation_accuracy, test_accuracy, test_loss, a benchmark of eval.tasks, parameters,
    tokens or seconds. A list makes a Pareto front; the first one ranks."""
    test: Place | None = None
    """A file whose questions every trial answers after its training, or null."""
    unrelated: Place | None = None
    """A file of unrelated text; the report says how much each trial's loss there differs from the base's (forgetting), or null."""
    problems: ProblemsConfig | None = None
    """Write word problems and use them as data.train, data.validation and test; null uses the run's own data."""
    pruner: Annotated[PrunerConfig, BeforeValidator(_pruner)] = Field(default_factory=lambda: PrunerConfig(kind="none"))
    """none, or a mapping with the kind halving or median and its settings."""
    together: int = Field(default=32, ge=1)
    """Most trials in one joint run."""
    memory: float | None = Field(default=None, gt=0)
    """Memory that a joint run may use, in GB (1e9 bytes). Trials that would need more alone are not tried; null is the GPU's, or no
    limit."""
    list: Mappings = Field(default_factory=lambda: [])
    """Whole settings: one mapping from dotted keys to values per variant."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: Any) -> Any:
        twice = sorted({seed for seed in value if value.count(seed) > 1})
        if twice:
            raise ValueError(
                f"must be different numbers, but {twice[0]} stands there twice: a trial is never run twice"
            )
        return value

    @field_validator("zip")
    @classmethod
    def _zipped_are_as_long(cls, value: Any) -> Any:
        lengths = {key: len(values) for key, values in value.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise ValueError(f"must have equally many values for every key, but {said}")
        return value

    @model_validator(mode="after")
    def _one_way_of_making_points(self) -> StudyConfig:
        static = [name for name in ("grid", "zip", "list") if getattr(self, name)]
        if self.search is not None and static:
            raise ValueError(
                f"search makes the points itself, so {static[0]} has no place beside it: remove one of the two"
            )
        if self.search is None and not static:
            raise ValueError("a study needs grid, zip, list or search: the settings that its trials vary")
        if self.search is not None and self.budget is not None:
            raise ValueError("budget is for grid, zip and list; that of a search is search.budget")
        if self.problems is not None and self.test is not None:
            raise ValueError("problems writes the test rows itself: remove test or problems")
        return self
