"""Virtual tokens before the sequence: run once and handed to the rows, they do what they do when they stand in every row for real.

The second implementation is the plain base with `inputs_embeds` of the prompt and the tokens.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.attaching.active import running
from graft.attention import flat_attention
from graft.bases.context import context_length
from graft.injection.state import state_of
from graft.routing.context import ForwardContext
from tests.contract.table import base, ids, logits, loss
from tests.families.zoo import TABLE, WITH_INTERFACE, batch, inputs_of, tiny

P = 4
LENGTHS = (9, 1, 7, 5)


def prompted(family: str, attention: str | None = None, **changes: Any) -> tuple[Any, Tensor]:
    """A model with prompts of two lengths, "a" active, and the vectors of "a" [P, D]."""
    model = tiny(family, attention, **changes)
    graft.attach(model, {"a": graft.PromptTuning(tokens=P), "b": graft.PromptTuning(tokens=2)})
    return model, next(p for _, p in graft.parameters(model, "a")).detach()


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def prepended(plain: Any, vectors: Tensor, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """What the plain base computes of [prompt; tokens], without the prompt's positions."""
    embedded = plain.get_input_embeddings()(inputs["input_ids"])
    mask = torch.cat([torch.ones(len(embedded), len(vectors), dtype=torch.long), inputs["attention_mask"]], 1)
    if "position_ids" in inspect.signature(type(plain).forward).parameters:
        more["position_ids"] = positions_of(mask)
    with torch.no_grad():
        both = torch.cat([vectors.expand(len(embedded), -1, -1), embedded], 1)
        return plain(inputs_embeds=both, attention_mask=mask, use_cache=False, **more).logits[:, len(vectors) :]


def run(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        more["position_ids"] = positions_of(inputs["attention_mask"])
    with torch.no_grad():
        return model(**inputs, use_cache=False, **more).logits


WIDE_WINDOW = {"mistral": 40, "gemma2": 40, "gemma3_text": 40}
"""A real token is hidden by a sliding window, a virtual one is not: here no window is left behind."""


@pytest.mark.parametrize("family", [*TABLE, *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_INTERFACE)])
def test_a_prompt_equals_one_that_stands_in_every_row(family: str) -> None:
    changes = {"sliding_window": WIDE_WINDOW[family]} if family in WIDE_WINDOW else {}
    model, vectors = prompted(family, "eager", **changes)
    inputs = batch()
    real = inputs["attention_mask"].bool()
    wanted = prepended(tiny(family, "eager", **changes), vectors, inputs)
    got, bare = run(model, inputs), run(tiny(family, "eager", **changes), inputs)
    torch.testing.assert_close(got[real], wanted[real], atol=2e-4, rtol=1e-4)
    assert (got - bare)[real].abs().max() > 1e-2


@pytest.mark.parametrize(("family", "attention"), [*((name, "eager") for name in WIDE_WINDOW), ("mistral", "sdpa")])
def test_a_sliding_window_hides_a_prompt_as_it_hides_real_tokens_where_the_adapter_says_so(
    family: str, attention: str
) -> None:
    model, vectors = prompted(family, attention)
    graft.attach(model, {"hidden": graft.PromptTuning(tokens=P, window="hides")})
    vectors = next(p for _, p in graft.parameters(model, "hidden")).detach()
    inputs = batch(padded=False)
    wanted = prepended(tiny(family, attention), vectors, inputs)
    with graft.use(model, "hidden"):
        torch.testing.assert_close(run(model, inputs), wanted, atol=2e-4, rtol=1e-4)
        whole = model(**inputs, use_cache=False).logits
        step = model(input_ids=inputs["input_ids"][:, :8], use_cache=True)
        last = model(input_ids=inputs["input_ids"][:, 8:], past_key_values=step.past_key_values).logits
    torch.testing.assert_close(last[:, 0], whole[:, 8], atol=2e-4, rtol=1e-4)
    with graft.route(model, ["a", "hidden", None]):
        mixed = run(model, inputs)
    torch.testing.assert_close(mixed[1], wanted[1], atol=2e-4, rtol=1e-4)
    for row, name in ((0, "a"), (2, None)):
        with graft.use(model, name):
            torch.testing.assert_close(mixed[row], run(model, inputs)[row], atol=2e-4, rtol=1e-4)
    with graft.use(model, "hidden"):
        parts = [inputs["input_ids"][0], inputs["input_ids"][1, :6]]
        alone = [logits(model, part[None], use_cache=False)[0] for part in parts]
    places = torch.cat([torch.arange(len(part)) for part in parts])[None]
    with torch.no_grad(), flat_attention(model), running(model, ForwardContext("hidden", (9, 6), flat=True)):
        flat = model(
            input_ids=torch.cat(parts)[None],
            position_ids=places,
            attention_mask=torch.zeros(1, 1, 1, 1),
            use_cache=False,
        )
    torch.testing.assert_close(flat.logits[0], torch.cat(alone), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "opt", "falcon-mha", "falcon-mq", "gptj", "qwen3"])
def test_padding_on_the_left_changes_nothing_when_positions_follow_the_mask(family: str) -> None:
    model, _ = prompted(family)
    inputs = batch()
    together = run(model, inputs)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = {key: tensor[row : row + 1, mask] for key, tensor in inputs.items()}
        torch.testing.assert_close(together[row, mask], run(model, alone)[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "falcon-mha", "gptj", "gemma2"])
def test_segments_of_a_flat_batch_have_their_own_prompts_or_none(family: str) -> None:
    model, _ = prompted(family, "eager")
    names = ("a", None, "b", "a")
    parts = [torch.arange(length) * (row + 3) % 61 for row, length in enumerate(LENGTHS)]
    more: dict[str, Any] = {"attention_mask": None if family in ("bloom", "falcon-mha") else torch.zeros(1, 1, 1, 1)}
    if family != "bloom":
        more["position_ids"] = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad(), flat_attention(model), running(model, ForwardContext(names, LENGTHS, flat=True)):
        flat = model(input_ids=torch.cat(parts)[None], use_cache=False, **more).logits[0].split(LENGTHS)
    for name, part, got in zip(names, parts, flat, strict=True):
        with graft.use(model, name):
            alone = logits(model, part[None], use_cache=False)[0]
        torch.testing.assert_close(got, alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "modernbert", "t5", "mt5", "bart"])
def test_encoders_have_the_prompt_in_front_of_every_row(family: str) -> None:
    model, vectors = prompted(family)
    inputs = inputs_of(family, padded=False)
    plain = tiny(family)
    embedded = plain.get_input_embeddings()(inputs["input_ids"])
    more = {key: tensor for key, tensor in inputs.items() if key.startswith("decoder")}
    # a head that stands outside of the model that owns the blocks reads the caller's first token, not the prompt's
    outside = family in ("electra", "distilbert")
    model, plain, output = (model.base_model, plain.base_model, 0) if outside else (model, plain, "logits")
    with torch.no_grad():
        got, bare = model(**inputs)[output], plain(**inputs)[output]
        wanted = plain(inputs_embeds=torch.cat([vectors.expand(len(embedded), -1, -1), embedded], 1), **more)[output]
    torch.testing.assert_close(got, wanted if more else wanted[:, P:], atol=1e-4, rtol=1e-4)
    assert (got - bare).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "bart", "modernbert"])
def test_rows_of_an_encoder_have_their_own_prompts_or_none_and_padding_changes_nothing(family: str) -> None:
    model, _ = prompted(family)
    whole, names, lengths = inputs_of(family, padded=False), ("b", None, "a"), (9, 6, 4)
    more = {key: tensor for key, tensor in whole.items() if key.startswith("decoder")}
    mask = torch.stack([torch.arange(9) < length for length in lengths]).long()
    with torch.no_grad(), graft.route(model, names):
        mixed = model(input_ids=whole["input_ids"], attention_mask=mask, **more)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        with torch.no_grad(), graft.use(model, name):
            own = {key: tensor[row : row + 1] for key, tensor in more.items()}
            alone = model(input_ids=whole["input_ids"][row : row + 1, :length], **own).logits[0]
        got = mixed.logits[row] if more or mixed.logits.dim() == 2 else mixed.logits[row, :length]
        torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)


def test_positions_that_follow_the_ids_follow_them_behind_a_prompt() -> None:
    model, _ = prompted("roberta")
    inputs = batch()
    with torch.no_grad():
        together = model(**inputs).logits
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = logits(model, inputs["input_ids"][row : row + 1, mask])[0]
        torch.testing.assert_close(together[row, mask], alone, atol=1e-4, rtol=1e-4)


def test_hidden_states_and_weights_of_an_encoder_are_the_callers_tokens() -> None:
    model, _ = prompted("bert", "eager")
    with torch.no_grad():
        out = model(**inputs_of("bert", padded=False), output_hidden_states=True, output_attentions=True)
    assert {tuple(each.shape) for each in out.hidden_states} == {(3, 9, 32)}
    assert {tuple(each.shape) for each in out.attentions} == {(3, 4, 9, 9)}


def test_gradients_are_those_of_a_prompt_in_every_row_also_under_checkpointing() -> None:
    inputs, model, plain = ids(3, 6), base("llama"), base("llama").requires_grad_(False)
    graft.attach(model, {"a": graft.PromptTuning(tokens=P)})
    ((_, vectors),) = graft.parameters(model, "a")
    own = vectors.detach().clone().requires_grad_()
    embedded = plain.get_input_embeddings()(inputs)
    out = plain(inputs_embeds=torch.cat([own.expand(3, -1, -1), embedded], 1)).logits[:, P:]
    torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), inputs[:, 1:].flatten()).backward()
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        vectors.grad = None
        loss(model, inputs).backward()
        torch.testing.assert_close(vectors.grad, own.grad, atol=1e-5, rtol=1e-4)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(graft.GraftError, match="do not train under reentrant checkpointing"):
        loss(model, inputs)


def test_what_was_noted_is_kept_until_a_weight_changes() -> None:
    model, inputs = base("llama"), ids(2, 5)
    graft.attach(model, {"a": [graft.PromptTuning(tokens=P), graft.LoRA(rank=2, sites="attn.v")]})
    state, tensors = state_of(model), dict(graft.parameters(model, "a"))
    first = logits(model, inputs)
    kept = state.prompt_caches["a"]
    assert torch.equal(logits(model, inputs), first) and state.prompt_caches["a"] is kept
    for name in tensors:
        with torch.no_grad():
            tensors[name].add_(0.3)
        changed = logits(model, inputs)
        assert state.prompt_caches["a"] is not kept
        if not name.endswith("A"):  # behind a zero B, A does nothing yet
            assert not torch.allclose(changed, first, atol=1e-4)
        kept, first = state.prompt_caches["a"], changed
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    logits(model, inputs)
    assert state.prompt_caches["a"] is not kept
    graft.detach(model)
    assert not state.prompt_caches


def test_what_was_noted_is_forgotten_when_a_fused_optimiser_changes_a_weight() -> None:
    model, inputs = base("llama"), ids(2, 5)
    graft.attach(model, {"a": graft.PromptTuning(tokens=P)})
    graft.set_active(model, "a")
    optimizer = torch.optim.AdamW([p for _, p in graft.parameters(model, "a")], lr=0.1, fused=True)
    for _ in range(2):
        before = logits(model, inputs)
        model(inputs).logits.sum().backward()
        optimizer.step()
        after = logits(model, inputs)
        assert not torch.allclose(after, before, atol=1e-4)
        torch.testing.assert_close(after, logits(copy.deepcopy(model), inputs))  # a copy has noted nothing


def test_what_was_noted_in_inference_mode_serves_training_too() -> None:
    model, inputs = base("llama"), ids(2, 5)
    graft.attach(model, {"a": graft.PromptTuning(tokens=P), "b": graft.LoRA(rank=2)})
    with torch.inference_mode():
        model(inputs)
    graft.set_active(model, "b")
    with graft.route(model, ["a", "b"]):
        loss(model, inputs).backward()
    assert all(p.grad is not None for _, p in graft.parameters(model, "b"))


def test_a_block_called_without_its_model_says_what_is_missing() -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.PromptTuning(tokens=P)})
    hidden = torch.zeros(1, 3, 32)
    rotary = model.model.rotary_emb(hidden, torch.arange(3)[None])
    with pytest.raises(graft.GraftError, match="run through the model that owns the blocks"):
        model.model.layers[0](hidden, position_embeddings=rotary)


def test_models_without_a_place_for_a_prompt_are_refused() -> None:
    model = tiny("mpt")
    with pytest.raises(graft.GraftError, match="does not use transformers' attention interface"):
        graft.attach(model, {"a": graft.PromptTuning(tokens=2)})
    assert graft.names(model) == () and "graft" not in str(type(model).__mro__)


def test_a_prompt_takes_positions_from_the_sequence() -> None:
    for family in ("llama", "bert"):
        model, _ = prompted(family)
        assert (
            context_length(model, "a") == 64 - P
            and context_length(model, "b") == 64 - 2
            and context_length(model) == 64
        )
