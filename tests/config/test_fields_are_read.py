"""A setting that nothing reads is a lie: every field of the configuration must be read somewhere in the package.

A field counts as read where the package takes it from an expression that names its section or a configuration
(`run.train.lr`, `config.lr`, `self.config.lr`), outside the configuration's own room.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import graft
from graft.config import (
    OBJECTIVES,
    BaseConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    HalvingConfig,
    JobConfig,
    RunConfig,
    SchedulerConfig,
    SourceConfig,
    TrainConfig,
)
from graft.config.methods import METHODS

PACKAGE = Path(graft.__file__).parent

# Fields whose reader is still being built. Empty in a finished version.
BEING_BUILT = ""
UNREAD = set(BEING_BUILT.split())

SECTIONS = {
    "run": RunConfig,
    "base": BaseConfig,
    "source": SourceConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "scheduler": SchedulerConfig,
    "distributed": DistributedConfig,
    "halving": HalvingConfig,
    "job": JobConfig,
    **{f"{kind}_config": model for kind, model in OBJECTIVES.items()},
}
FIELDS = [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]
FIELDS += sorted({f"method.{name}" for model in METHODS.values() for name in model.model_fields})


def _reads() -> dict[str, set[tuple[str, str]]]:
    """Room -> (expression, attribute) of every attribute that is read in it."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in PACKAGE.rglob("*.py"):
        own = found.setdefault(path.relative_to(PACKAGE).parts[0], set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                own.add((ast.unparse(node.value), node.attr))
    return found


BY_ROOM = _reads()
OWN = ("config", "adapters", "attention")
"""Rooms with configurations of their own."""
READS = {each for room, reads in BY_ROOM.items() if room not in OWN for each in reads}
OF_ADAPTERS = {(owner.split(".")[-1], name) for reads in BY_ROOM.values() for owner, name in reads}


def _is_read(field: str) -> bool:
    section, name = field.split(".")
    carriers = (section, "config", "settings", "run")
    return any(attribute == name and any(word in owner.lower() for word in carriers) for owner, attribute in READS)


@pytest.mark.parametrize("field", sorted(set(FIELDS) - UNREAD))
def test_the_field_is_read(field: str) -> None:
    assert _is_read(field), f"nothing in the package reads {field}: use it or remove it"


def test_the_list_of_fields_being_built_is_current() -> None:
    assert set(FIELDS) >= UNREAD
    assert [field for field in UNREAD if _is_read(field)] == [], "these are read now: take them off the list"


@pytest.mark.parametrize("kind", sorted(graft.kinds()))
def test_every_field_of_an_adapter_kind_is_read(kind: str) -> None:
    for field in graft.kinds()[kind].model_fields:
        assert field == "kind" or ("self", field) in OF_ADAPTERS or ("config", field) in OF_ADAPTERS, (
            f"nothing reads {kind}.{field}"
        )
