"""Prefixes that start from a text, and prefixes that a sliding window hides."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import graft
from tests.contract.table import base, ids, logits
from tests.families.zoo import tiny
from tests.small import small_tokenizer

TEXT = (7, 8, 9, 4)


@pytest.mark.parametrize(
    "family", ["llama", "bloom", "gpt2", "gptj", "opt", "falcon", "falcon-mha", "qwen3", "gemma", "phi3"]
)
def test_a_prefix_that_starts_from_a_text_is_the_base_with_that_text_before_its_input(family: str) -> None:
    model, inputs = tiny(family, None), ids(2, 6)
    whole = logits(model, torch.cat([torch.tensor([TEXT] * 2), inputs], 1), use_cache=False)[:, len(TEXT) :]
    config = graft.Prefix(tokens=4, init="text", init_ids=TEXT, positions="after_prefix")
    graft.attach(model, {"other": graft.LoRA(rank=2), "a": config})
    graft.set_active(model, "a")
    torch.testing.assert_close(logits(model, inputs, use_cache=False), whole, atol=1e-4, rtol=1e-4)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_what_a_text_cannot_start_is_an_error() -> None:
    tokenizer = small_tokenizer()
    for fields, said in (
        ({"init_text": "hi"}, "need each other"),
        ({"init": "text", "init_ids": TEXT, "positions": "after_prefix"}, "set tokens: 4"),
        ({"init": "text", "init_ids": TEXT, "tokens": 4}, "need positions: after_prefix"),
        ({"window": "hides"}, "need positions: after_prefix"),
        (
            {"init": "text", "init_ids": TEXT, "tokens": 4, "positions": "after_prefix", "projection": 3},
            "but a projection produces them",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            graft.Prefix(**fields)
    config = graft.Prefix(tokens=2, init="text", init_text="hi", positions="after_prefix")
    with pytest.raises(graft.GraftError, match="no token ids yet"):
        graft.attach(base("llama"), {"a": config})
    assert config.tokenised(tokenizer).init_ids == tuple(tokenizer("hi")["input_ids"])
    with pytest.raises(graft.GraftError, match="is not a token id of this base, which has 61"):
        graft.attach(base("llama"), {"a": config.tokenised(tokenizer)})
    with pytest.raises(graft.GraftError, match="does not show the keys and values"):
        graft.attach(
            tiny("deberta-v2"), {"a": graft.Prefix(tokens=4, init="text", init_ids=TEXT, positions="after_prefix")}
        )


def test_a_prefix_that_a_sliding_window_hides_equals_pefts() -> None:
    peft = pytest.importorskip("peft")
    config = MistralConfig(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, max_position_embeddings=64, sliding_window=6)  # fmt: skip
    torch.manual_seed(3)
    plain, inputs = MistralForCausalLM(config).eval(), ids(2, 9)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model = MistralForCausalLM(config).eval()
    model.load_state_dict(plain.state_dict())
    reference = peft.get_peft_model(plain, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    outputs = {}
    for window in ("shows", "hides"):
        graft.attach(model, {window: graft.Prefix(tokens=3, positions="after_prefix", window=window)})
        embedding = reference.prompt_encoder["default"].embedding.weight
        slots = embedding.detach().view(3, 4, 2, 8).unbind(1)
        with torch.no_grad():
            for (_, parameter), slot in zip(graft.parameters(model, window), slots, strict=True):
                parameter.copy_(slot)
        with graft.use(model, window):
            outputs[window] = logits(model, inputs, attention_mask=torch.ones_like(inputs))
    theirs = logits(reference, inputs, attention_mask=torch.ones_like(inputs))
    torch.testing.assert_close(outputs["hides"], theirs, atol=3e-5, rtol=0)
    assert (outputs["shows"] - theirs).abs().max() > 1e-2
