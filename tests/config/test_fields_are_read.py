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


def _reads() -> set[tuple[str, str]]:
    """(expression, attribute) of every attribute that is read, but for the rooms with configurations of their own."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in ("config", "adapters", "attention"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found.add((ast.unparse(node.value), node.attr))
    return found


READS = _reads()


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
    reads = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads.add((ast.unparse(node.value).split(".")[-1], node.attr))
    for field in graft.kinds()[kind].model_fields:
        assert field == "kind" or ("self", field) in reads or ("config", field) in reads, (
            f"nothing reads {kind}.{field}"
        )
