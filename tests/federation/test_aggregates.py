"""What the aggregates of LoRAs are worth: the loss after a round from which all of them start with the same clients' adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.federation.definition import read_federation
from graft.federation.methods.base import Update
from graft.federation.methods.choosing import method_of
from graft.federation.methods.forms import approximated
from graft.federation.methods.parameters import averaged
from graft.federation.workplace import Workplace


def definition(shared: Path, seed: int) -> dict[str, Any]:
    """Ten clients with unlike categories of Dolly, who take many steps."""
    return {
        "base": {"model": str(shared / "models" / "stories-260k"), "device": "cpu", "dtype": "float32"},
        "data": {
            "train": str(shared / "data" / "dolly" / "dolly_3k.json"), "validation": 300, "template": "plain", "max_length": 96,
            "overlong": "drop",
        },
        "clients": {"split": "dirichlet", "count": 10, "label": "category", "alpha": 0.5},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "sites": "linear"}, "method": "fedavg",
        "local": {"steps": 40, "batch_size": 1, "lr": 3e-3}, "rounds": 1, "seed": seed,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_average_of_factors_is_worse_than_that_of_differences(shared: Path, seed: int) -> None:
    fed = method_of(Workplace(read_federation(definition(shared, seed))))
    rows = {name: len(own) for name, own in fed.place.clients.items()}
    sent = [Update(name, count / sum(rows.values()), *fed.work({}, 1, name)) for name, count in rows.items()]
    exact, _ = fed.aggregate({}, sent)
    near, notes = approximated(exact, 8)
    losses = {"first": fed.scores({}), "exact": fed.scores(exact), "rank 8": fed.scores(near)}
    fed.put({})
    part = fed._part(fed.place.federation.adapter_of(0), 1)
    part.job.trainable.restore(averaged(sent))
    losses["naive"] = fed.place.scores("federated", fed.stop_ids)
    print(seed, {name: round(each["loss"], 4) for name, each in losses.items()}, notes)
    assert losses["exact"]["loss"] + 0.02 < losses["naive"]["loss"] < losses["first"]["loss"]
    assert losses["exact"]["loss"] <= losses["rank 8"]["loss"] < losses["naive"]["loss"]
