"""Numerics: dtypes, gradient checkpointing, padding on either side, attention backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.attaching.active import route, running, set_trainable, use
from graft.attaching.parameters import parameters
from graft.routing.context import ForwardContext
from graft.testing.bases import PAD, ids, logits, loss
from graft.testing.case import Case, DoesNotApply
from graft.testing.checks.promise import close, gradients, holds, listed, may_refuse, promise, same_gradients

LENGTHS = (7, 3, 5)
"""Real tokens of each row of a padded batch."""
BACKENDS = frozenset({"llama", "qwen3", "gpt2"})
"""Families whose attention runs both as "eager" and as "sdpa" on a padded batch."""


def padded(side: str) -> dict[str, Tensor]:
    """Return rows of unequal lengths, padded on the left or right, with their mask."""
    whole, mask = ids(len(LENGTHS), max(LENGTHS)), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)] = 1
    return {"input_ids": whole.masked_fill(mask == 0, PAD), "attention_mask": mask}


def with_positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the positions that the mask gives."""
    if "bloom" in model.config.model_type:
        return inputs  # takes none: its ALiBi comes from the mask
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@promise("Padding on the left changes no real token's output.")
def check_padding_on_the_left(case: Case) -> None:
    case.needs_causal()
    _padding_changes_nothing(case, "left")


@promise("Padding on the right changes no real token's output.")
def check_padding_on_the_right(case: Case) -> None:
    if case.family.startswith("t5"):
        raise DoesNotApply("an encoder-decoder reads the padding of its own decoder input here")
    _padding_changes_nothing(case, "right")


def _padding_changes_nothing(case: Case, side: str) -> None:
    model, inputs = case.attached(), padded(side)
    with torch.no_grad():
        batch = model(**(with_positions(model, inputs) if case.causal else inputs)).logits
    for number in range(len(LENGTHS)):
        real = inputs["attention_mask"][number].bool()
        single = logits(model, inputs["input_ids"][number, real][None])[0]
        what = f"row {number}, with {int((~real).sum())} padding tokens on the {side}, equals the row without padding"
        close(batch[number, real], single, 3e-5, what)


@promise("Eager and SDPA attention give the same output, with padding and without.")
def check_attention_backends_agree(case: Case) -> None:
    if case.family not in BACKENDS:
        raise DoesNotApply(f"this check runs on {', '.join(sorted(BACKENDS))}")
    for inputs in (padded("left"), {"input_ids": ids()}):
        found = []
        for attention in ("eager", "sdpa"):
            model = case.attached(attention=attention)
            real = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
            found.append(logits(model, inputs["input_ids"], attention_mask=inputs.get("attention_mask"))[real])
        batch = "a padded batch" if "attention_mask" in inputs else "a batch without padding"
        close(found[1], found[0], 3e-5, f"SDPA attention gives the output of eager attention on {batch}")


@promise("A bfloat16 base gives what float32 gives, as closely as without the adapter, and float32 gradients.")
def check_bfloat16_is_close_to_float32(case: Case) -> None:
    exact, rough, inputs = case.attached(), case.attached(dtype=torch.bfloat16), ids(4, 8)
    with torch.no_grad():
        for (_, p), (_, q) in zip(parameters(exact, "a"), parameters(rough, "a"), strict=True):
            q.copy_(p)
    out = logits(rough, inputs)
    holds(out.dtype == torch.bfloat16, f"the output of a bfloat16 base is bfloat16; found {out.dtype}. Cast to h.dtype")

    def error(name: str | None) -> float:
        with use(exact, name), use(rough, name):
            wanted = logits(exact, inputs)
            return float((logits(rough, inputs).float() - wanted).norm() / wanted.norm())

    adapter, base = error("a"), error(None)
    holds(
        adapter < 3 * base + 0.01,
        f"in bfloat16 the output with the adapter is off by {adapter:.1%} of float32's, the base's own by {base:.1%} "
        "(allowed: three times that and 1%)",
    )
    loss(rough.train(), inputs).backward()
    found = gradients(rough)
    missing = {f"a.{name}" for name, _ in parameters(rough, "a")} - set(found)
    holds(not missing, f"on a bfloat16 base, no gradient reaches {listed(sorted(missing))}")
    wrong = [name for name, grad in found.items() if grad.dtype != torch.float32 or not grad.isfinite().all()]
    holds(not wrong, f"on a bfloat16 base, gradients are finite float32 numbers; they are not at {listed(wrong)}")


@promise("Gradient checkpointing gives the same gradients, also when the context was left before backward.")
def check_checkpointing_gives_the_same_gradients(case: Case) -> None:
    model, inputs = case.attached("a", "b").train(), ids(4)
    set_trainable(model, ["a", "b"])

    def measured() -> list[tuple[float, dict[str, Tensor]]]:
        found = []
        for rows in (("a",) * 4, ("b", None, "a", "b")):
            with running(model, ForwardContext(rows, lengths=(7,) * 4, seeds=(3, 4, 5, 6))):
                value = loss(model, inputs)
            with route(model, [None, "b", "b", None]):  # recomputation must not see this routing
                value.backward()
            found.append((value.item(), gradients(model)))
        return found

    plain = measured()
    checkpointed(model)
    what = "gradient checkpointing, with the context left before backward, gives the gradients of a plain pass"
    for (value, wanted), (other, found) in zip(plain, measured(), strict=True):
        holds(abs(value - other) <= 2e-6, f"gradient checkpointing changes the loss from {value} to {other}")
        same_gradients(found, wanted, relative(1e-5), what)


@promise("Reentrant gradient checkpointing gives the same gradients in a mixed batch.")
def check_reentrant_checkpointing_gives_the_same_gradients(case: Case) -> None:
    model, inputs = case.attached("a", "b").train(), ids(4)
    set_trainable(model, ["a", "b"])
    found = []
    for enable in (lambda: None, lambda: checkpointed(model, reentrant=True)):
        enable()
        torch.manual_seed(4)
        with route(model, ["b", None, "a", "b"]), may_refuse("reentrant checkpointing"):
            value = loss(model, inputs)
        value.backward()
        found.append(gradients(model))
    same_gradients(
        found[1], found[0], relative(1e-5), "reentrant gradient checkpointing gives the gradients of a plain pass"
    )


def checkpointed(model: Any, reentrant: bool = False) -> None:
    """Turn gradient checkpointing on."""
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def relative(tolerance: float) -> Any:
    """Allow `tolerance` times a gradient's largest number, or `tolerance` where that is below 1."""
    return lambda gradient: tolerance * max(1.0, float(gradient.abs().max()))
