"""Positions and padding are the model's own, for every type: a batch gives each row the loss that transformers gives it alone."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import graft
from graft.data.datasets import TokenDataset
from graft.data.samples import Example
from graft.generation.loss import sample_losses
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from tests.architectures import TYPES, UNBUILT, build
from tests.training.conftest import batcher, job_on

SAMPLE = {"camembert", "cpmant", "data2vec-text", "gpt2", "llama", "opt", "prophetnet", "roberta", "xlm-roberta-xl"}
ALONE = {
    "cpmant": "it takes padding on the left only",
    "prophetnet": "its n-grams see padding",
}
"""Types whose rows run alone, with the reason."""
UNLIKE = {
    **dict.fromkeys(("glm4_moe_lite", "minicpm3"), "transformers does not run padded batches at this size"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "it has one head for each codebook"),
    "xlm": "it takes the rows' lengths by an argument of its own",
}
"""Types that these batches do not suit, with the reason."""


def rows() -> list[Example]:
    made = []
    for number, length in enumerate((9, 5, 7)):
        ids = np.arange(20 + 10 * number, 20 + 10 * number + length).astype(np.int32)
        made.append(Example(ids, np.arange(length) >= 3, "data.jsonl", number + 1))
    return made


@torch.no_grad()
def own_losses(model: Any) -> list[float]:
    """What transformers says of each row alone, without positions."""
    found = []
    for row in rows():
        ids = torch.as_tensor(row.input_ids).long()[None]
        out = model(input_ids=ids)
        logits = out.logits if hasattr(out, "logits") else out[0]
        logs = logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        found.append(-float(logs[torch.as_tensor(row.supervised[1:])].sum()))
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.slow]) for name in TYPES if name not in UNBUILT],
)
def test_a_batch_gives_each_row_the_loss_that_transformers_gives_it_alone(name: str) -> None:
    model = build(name).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    if model.config.is_encoder_decoder:
        pytest.skip("its answers have a decoder")
    if name == "reformer":
        pytest.skip("its hashes are random")
    model.config.use_cache = False
    try:
        wanted = own_losses(model)
    except Exception as error:
        pytest.skip(f"transformers does not run this type at this size: {error}")
    if name in UNLIKE:
        pytest.skip(UNLIKE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graft.attach(model, {"a": graft.LoRA(rank=1, sites="linear")})
    job = job_on(model, train=TokenDataset.of(rows()), batch_size=3)
    forward = Forward(model)
    if name in ALONE:
        with pytest.raises(graft.GraftError, match="other losses in a padded batch than alone"):
            decide(forward, [job], "padded", batcher())
    budget = 1 if name in ALONE else 4096
    layout = decide(forward, [job], "auto", batcher(budget=budget)).layout
    found: dict[int, float] = {}
    for micro in batcher(layout, budget).cut(job.rows()):
        with laid_out(model, layout), torch.no_grad():
            losses = forward.losses(*batcher(layout).inputs(micro, forward.device))
        found |= {
            row.sample: float(each.sum())
            for row, each in zip(micro, losses.split([r.targets for r in micro]), strict=True)
        }
    np.testing.assert_allclose([found[number] for number in range(3)], wanted, rtol=1e-3)
    np.testing.assert_allclose(sample_losses(model, rows(), ["a"] * 3, token_budget=budget), wanted, rtol=1e-3)
