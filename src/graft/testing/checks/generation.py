"""Generation: a batch of unequal prompts equals one prompt at a time, with every cache and with none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.attaching.active import route, use
from graft.injection.arguments import cache_of
from graft.testing.bases import PAD, ids, logits
from graft.testing.case import Case
from graft.testing.checks.promise import close, holds, may_refuse, promise

NEW = 5
"""Tokens that each prompt generates."""


def greedy(model: Any, inputs: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """Return the new tokens [B, NEW] of greedy decoding."""
    settings |= {
        "attention_mask": torch.ones_like(inputs) if mask is None else mask,
        "pad_token_id": PAD,
        "do_sample": False,
    }
    new = model.generate(inputs, max_new_tokens=NEW, min_new_tokens=NEW, disable_compile=True, **settings)
    return new[:, inputs.shape[1] :]


def prompts() -> tuple[list[Tensor], Tensor, Tensor]:
    """Return three prompts of unequal lengths, the same as one batch with padding on the left, and its mask."""
    parts = [ids(1, length, seed)[0] for seed, length in enumerate((6, 2, 9))]
    batch = torch.full((3, 9), PAD)
    for row, part in enumerate(parts):
        batch[row, 9 - len(part) :] = part
    return parts, batch, torch.tensor([[0] * (9 - len(part)) + [1] * len(part) for part in parts])


@promise("A batch of unequal prompts generates what each prompt generates alone, with every cache and with none.")
def check_unequal_prompts_equal_one_at_a_time(case: Case) -> None:
    case.needs_causal()
    model = case.attached()
    parts, batch, mask = prompts()
    alone = torch.cat([greedy(model, part[None]) for part in parts])
    caches = {"its cache": {}, "no cache": {"use_cache": False}, "a static cache": {"cache_implementation": "static"}}
    for cache, settings in caches.items():
        with may_refuse(cache):
            found = greedy(model, batch, mask, **settings)
        _same_tokens(found, alone, f"a batch of unequal prompts with {cache}")


@promise("Prompts that are routed to several adapters generate what each adapter generates alone.")
def check_routed_prompts_equal_each_adapter_alone(case: Case) -> None:
    case.needs_causal()
    model, names = case.attached("a", "b"), ("b", None, "a")
    parts, batch, mask = prompts()
    with route(model, names):
        mixed = greedy(model, batch, mask)
    alone = []
    for part, name in zip(parts, names, strict=True):
        with use(model, name):
            alone.append(greedy(model, part[None]))
    _same_tokens(mixed, torch.cat(alone), "a batch of routed prompts")


@promise("Tokens fed one at a time through the KV cache give the logits of the whole sequence.")
def check_cache_gives_the_logits_of_the_whole(case: Case) -> None:
    case.needs_causal()
    model, inputs = case.attached(), ids(2, 7)
    whole = logits(model, inputs, use_cache=False)
    with torch.no_grad():
        out = model(input_ids=inputs[:, :4], use_cache=True)
        steps = [out.logits]
        for token in range(4, 7):
            out = model(input_ids=inputs[:, token : token + 1], past_key_values=cache_of(out), use_cache=True)
            steps.append(out.logits)
    close(
        torch.cat(steps, 1),
        whole,
        3e-5,
        "tokens one at a time through the KV cache give the logits of the whole sequence",
    )


def _same_tokens(found: Tensor, alone: Tensor, what: str) -> None:
    apart = [row for row in range(len(alone)) if not torch.equal(found[row], alone[row])]
    if apart:
        row = apart[0]
        holds(
            False,
            f"{what} generates what each prompt generates alone; row {row} gave {found[row].tolist()} instead of "
            f"{alone[row].tolist()}",
        )
