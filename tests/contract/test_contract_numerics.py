"""Points 8 and 12: dtypes, gradient checkpointing, padding on either side, attention backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.attaching.active import running, set_trainable
from graft.routing.context import ForwardContext
from tests.contract.table import PAD, Row, attached, ids, logits, loss, pristine, rows

LENGTHS = (7, 3, 5)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all adapters, taken away from the model."""
    found = {
        f"{name}.{key}": p.grad.clone()
        for name in graft.names(model)
        for key, p in graft.parameters(model, name)
        if p.grad is not None
    }
    model.zero_grad()
    return found


def padded(side: str) -> dict[str, Tensor]:
    """Rows of unequal lengths with their mask, and positions that the mask gives."""
    whole, mask = ids(len(LENGTHS), max(LENGTHS)), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)] = 1
    return {"input_ids": whole.masked_fill(mask == 0, PAD), "attention_mask": mask}


def with_positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if "bloom" in model.config.model_type:
        return inputs  # takes none: its ALiBi comes from the mask
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@rows(where=lambda row: row.causal)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(row: Row, side: str) -> None:
    model, inputs = attached(row), padded(side)
    with torch.no_grad():
        batch = model(**with_positions(model, inputs)).logits
    for number in range(len(LENGTHS)):
        real = inputs["attention_mask"][number].bool()
        alone = logits(model, inputs["input_ids"][number, real][None])[0]
        torch.testing.assert_close(batch[number, real], alone, atol=3e-5, rtol=0)


@rows(where=lambda row: row.family == "bert")
def test_padding_on_the_right_changes_nothing_in_an_encoder(row: Row) -> None:
    model, inputs = attached(row), padded("right")
    with torch.no_grad():
        batch = model(**inputs).logits
    for number, length in enumerate(LENGTHS):
        alone = logits(model, inputs["input_ids"][number : number + 1, :length])[0]
        torch.testing.assert_close(batch[number, :length], alone, atol=3e-5, rtol=0)


@rows(
    where=lambda row: (
        row.family in ("llama", "qwen3", "gpt2") and any("attention" in part.takes for part in row.config.parts())
    )
)
def test_eager_and_sdpa_attention_agree(row: Row) -> None:
    for inputs in (padded("left"), {"input_ids": ids()}):
        outputs = []
        for attention in ("eager", "sdpa"):
            model = attached(row, attention)
            real = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
            outputs.append(logits(model, inputs["input_ids"], attention_mask=inputs.get("attention_mask"))[real])
        torch.testing.assert_close(*outputs, atol=3e-5, rtol=0)


@rows()
def test_bfloat16_is_as_close_to_float32_as_the_base_is(row: Row) -> None:
    exact, rough, inputs = attached(row), attached(row, None, torch.bfloat16), ids(4, 8)
    with torch.no_grad():
        for (_, p), (_, q) in zip(graft.parameters(exact, "a"), graft.parameters(rough, "a"), strict=True):
            q.copy_(p)
    out = logits(rough, inputs)
    assert out.dtype == torch.bfloat16

    def error(name: str | None) -> float:
        with graft.use(exact, name), graft.use(rough, name):
            wanted = logits(exact, inputs)
            return float((logits(rough, inputs).float() - wanted).norm() / wanted.norm())

    assert error("a") < 3 * error(None) + 0.01
    loss(rough.train(), inputs).backward()
    found = gradients(rough)
    assert set(found) == {f"a.{name}" for name, _ in graft.parameters(rough, "a")}
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found.values())


def checkpointed(model: Any, reentrant: bool = False) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def without_dropout_of_the_base(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.0
    return model


@rows()
def test_checkpointing_gives_the_same_gradients_also_when_the_context_was_left(row: Row) -> None:
    model, inputs = without_dropout_of_the_base(attached(row, None, torch.float32, "a", "b").train()), ids(4)
    set_trainable(model, ["a", "b"])
    seeds, routes = (3, 4, 5, 6), (("a",) * 4, ("b", None, "a", "b"))

    def measured() -> list[tuple[float, dict[str, Tensor]]]:
        found = []
        for names in routes:
            with running(model, ForwardContext(names, lengths=(7,) * 4, seeds=seeds)):
                value = loss(model, inputs)
            with graft.route(model, [None, "b", "b", None]):
                value.backward()
            found.append((value.item(), gradients(model)))
        return found

    plain = measured()
    checkpointed(model)
    again = measured()
    for (value, grads), (other, others) in zip(plain, again, strict=True):
        assert value == pytest.approx(other, abs=2e-6) and set(grads) == set(others)
        for name, grad in grads.items():
            torch.testing.assert_close(
                others[name], grad, atol=1e-5 * max(1.0, float(grad.abs().max())), rtol=0, msg=name
            )


@rows("llama-mam llama-lora bloom-prefix gptj-parallel-attn llama-hira-plain llama-oft-coft")
def test_reentrant_checkpointing_gives_the_same_gradients(row: Row) -> None:
    model, inputs = without_dropout_of_the_base(attached(row, None, torch.float32, "a", "b").train()), ids(4)
    set_trainable(model, ["a", "b"])
    found = []
    for enable in (lambda: None, lambda: checkpointed(model, reentrant=True)):
        enable()
        with graft.route(model, ["b", None, "a", "b"]):
            value = loss(model, inputs)
        value.backward()
        found.append(gradients(model))
    assert set(found[0]) == set(found[1])
    for name, grad in found[0].items():
        torch.testing.assert_close(
            found[1][name], grad, atol=1e-5 * max(1.0, float(grad.abs().max())), rtol=0, msg=name
        )


@rows(
    "llama-lora-dropout llama-parallel-mam bloom-series-before-attn llama-dora-dropout llama-pissa-quick llama-adalora "
    "llama-miss llama-miss-bat llama-hira llama-shira llama-oft-exact"
)
def test_a_row_draws_the_same_dropout_in_any_company(row: Row) -> None:
    model, inputs = without_dropout_of_the_base(attached(row, None, torch.float32, "a", "b").train()), ids(3)
    with running(model, ForwardContext(("a", "b", "a"), (7, 7, 5), seeds=(1, 2, 3))):
        batch = logits(model, inputs)
    with running(model, ForwardContext("a", (5,), seeds=(3,))):
        torch.testing.assert_close(batch[2, :5], logits(model, inputs[2:, :5])[0], atol=2e-5, rtol=0)
    with running(model, ForwardContext("a", (5,), seeds=(4,))):
        assert not torch.allclose(batch[2, :5], logits(model, inputs[2:, :5])[0], atol=1e-3)
    with graft.use(model.eval(), None):
        assert torch.equal(logits(model, inputs), logits(pristine(row.family), inputs))
