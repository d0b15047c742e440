"""Caches: a static one gives the answers of one that grows, for every kind of adapter, and says where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, MptConfig, MptForCausalLM

import graft
from graft.errors import GraftError
from graft.generation.causal import CacheKind
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Request
from tests.small import small_model

KINDS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 4, "sites": "attn.q attn.v mlp.down"},
    "series": {"kind": "series", "bottleneck": 8},
    "parallel": {"kind": "parallel", "bottleneck": 8},
    "prefix": {"kind": "prefix", "tokens": 5},
    "moved": {"kind": "prefix", "tokens": 3, "positions": "after_prefix"},
}
SLIDING = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 258,
}
SLIDING |= {"num_key_value_heads": 2, "sliding_window": 16}


def adapted(model: Any, *names: str) -> Any:
    """With strong random adapters."""
    graft.attach(model, {name: KINDS[name] for name in names or KINDS})
    torch.manual_seed(1)
    with torch.no_grad():
        for name in graft.names(model):
            for _, parameter in graft.parameters(model, name):
                parameter.normal_(std=2.0 if KINDS[name]["kind"] == "prefix" else 0.5)
    return model


def asked(model: Any, lengths: tuple[int, ...] = (3, 17, 8, 1, 30)) -> list[Request]:
    draw = torch.Generator().manual_seed(2)
    ids = [tuple(torch.randint(2, 258, (length,), generator=draw).tolist()) for length in lengths]
    stop = frozenset(range(2, 258, 9))
    return [Request(one, name, stop) for name in (None, *graft.names(model)) for one in ids]


def answers(model: Any, cache: CacheKind, beams: int = 1, tokens: int = 12) -> dict[int, Any]:
    decoding = Decoding(tokens, beams)
    return dict(generate(model, asked(model), decoding, token_budget=10**6, cache=cache))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gptj"])
def test_a_static_cache_answers_as_a_growing_one(family: str, beams: int) -> None:
    model = adapted(small_model(family))
    expected = answers(model, "dynamic", beams)
    assert answers(model, "static", beams) == expected
    assert len({answer.ids for answer in expected.values()}) > len(expected) // 2
    assert {answer.reason for answer in expected.values()} == {"stopped", "truncated"}


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_static_cache_slides_as_a_growing_one(family: str) -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        kinds: dict[str, Any] = {
            "mistral": (MistralConfig, MistralForCausalLM),
            "gemma2": (Gemma2Config, Gemma2ForCausalLM),
        }
        config, kind = kinds[family]
        extra = {"head_dim": 8} if family == "gemma2" else {}
        model = adapted(kind(config(**SLIDING, **extra)).eval(), "lora", "series", "prefix")
    assert answers(model, "static") == answers(model, "dynamic")


def test_a_family_without_a_static_cache_says_so() -> None:
    model = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=258)).eval()
    with pytest.raises(GraftError, match="MptForCausalLM cannot generate with a static cache.*--cache dynamic"):
        answers(model, "static")
    with pytest.raises(GraftError, match="no cache 'statik'. Did you mean 'static'"):
        answers(model, "statik")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("gptj", 1), ("bloom", 1)])
def test_compiled_steps_answer_as_eager_ones(family: str, beams: int) -> None:
    torch._dynamo.reset()
    model = adapted(small_model(family, **({"num_hidden_layers": 1} if family == "llama" else {})))
    assert answers(model, "compiled", beams) == answers(model, "dynamic", beams)
    torch._dynamo.reset()
