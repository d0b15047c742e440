"""What each process of a pipeline does in tests of families: trains tiny models of them alone and in stages, and compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers

import graft
from graft.attaching.active import set_trainable
from graft.distributed.group import together
from graft.distributed.shares import Shares
from graft.errors import GraftError
from graft.training.batching import Batcher
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import set_training
from graft.training.forward.tasks import forward_of
from graft.training.isolation import joint_step
from graft.training.job import Job
from graft.training.rows import Row, by_job
from graft.training.staging import cut_into_stages
from tests.training.conftest import CONFIGS, GATED, data, job_on, pairs, tiny

STEPS = 3
KINDS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 2, "sites": "linear", "dropout": 0.2},
    "series": {"kind": "series", "bottleneck": 4},
    "prefix": {"kind": "prefix", "tokens": 2},
    "prompt": {"kind": "prompt", "tokens": 3},
    "dpo": {"kind": "lora", "rank": 2, "sites": "linear"},
}
MORE: dict[str, Any] = {
    "deep": lambda: transformers.LlamaConfig(**{**GATED, "num_hidden_layers": 5}),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4, time_step_rank=4
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**GATED, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **{**GATED, "num_hidden_layers": 4}, head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
        layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
}  # fmt: skip
CONFIGS.update(MORE)


class Apart(Batcher):
    """Micro-batches of one job each, as in a pipeline: bases that round inside (norms in float32) then round alike."""

    def cut(self, rows: Sequence[Row]) -> list[list[Row]]:
        return [micro for own in by_job(rows).values() for micro in super(Apart, self).cut([rows[at] for at in own])]


def world(family: str, dtype: torch.dtype) -> tuple[Any, list[Job]]:
    """A model with a job of each kind that it takes."""
    model, jobs = tiny(family, dtype), []
    for number, (name, spec) in enumerate(KINDS.items()):
        if (family, name) == ("mamba", "prompt"):
            continue  # it does not mask padding, so such a job needs a token budget of 1
        torch.manual_seed(number)
        try:
            graft.attach(model, {name: spec})
        except GraftError:
            continue
        make, objective = (pairs, "dpo") if name == "dpo" else (data, None)
        jobs.append(
            job_on(model, name, make(12, seed=number, longest=9), batch_size=3, seed=number, objective=objective)
        )
    set_trainable(model, [job.name for job in jobs])
    return model, jobs


def trained(model: Any, jobs: list[Job], batcher: Batcher) -> list[float]:
    """Losses, step by step."""
    forward, found = forward_of(model), []
    layout = decide(forward, jobs, "auto", batcher).layout
    set_training(model, [job.name for job in jobs])
    with laid_out(model, layout):
        for _ in range(STEPS):
            outcomes, failures = joint_step(forward, jobs, replace(batcher, layout=layout))
            assert not failures, failures
            found += [outcomes[job.name].loss for job in jobs]
    return found


def compared(family: str, dtype: torch.dtype, shares: Shares) -> dict[str, Any]:
    """The largest differences of losses and parameters from those of one process, or why the family is refused."""
    one, alone = world(family, dtype)
    wanted = trained(one, alone, Apart(64, "padded", 0))
    model, jobs = world(family, dtype)
    batcher = Batcher(64, "padded", 0, shares)
    try:
        cut_into_stages(model, jobs, batcher, "auto")
    except GraftError as error:
        return {"refused": str(error)}
    found = trained(model, jobs, batcher)
    apart = [
        float((given - parameter).detach().abs().max())
        for job, other in zip(jobs, alone, strict=True)
        for given, parameter in zip(job.params.values(), other.params.values(), strict=True)
    ]
    pairs_of_losses = zip(found, wanted, strict=True)
    return {
        "kinds": [job.name for job in jobs],
        "losses": max(abs(a / b - 1) for a, b in pairs_of_losses),
        "parameters": max(apart),
    }


def main() -> None:
    """stages.py DTYPE FAMILIES: one line of JSON for each family, on rank 0."""
    torch.set_num_threads(1)
    dtype, families = sys.argv[1:]
    with together() as group:
        shares = Shares(group, "pipeline")
        for family in families.split(","):
            found = compared(family, getattr(torch, dtype), shares)
            if group.leads:
                print(json.dumps({"family": family, **found}), flush=True)


if __name__ == "__main__":
    main()
