"""What a forward is given, by name, whichever name the release has for the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from graft.injection.arguments import cache_name, cache_of, cached_tokens, given_to


class Before(nn.Module):
    """The shape of forwards up to transformers 5.23."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **more: Any) -> Any:
        return input_ids


class After(nn.Module):
    """The shape of forwards from 5.24 on, which take the old name among the rest."""

    def forward(self, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        return input_ids


class Without(nn.Module):
    def forward(self, hidden_states: Any) -> Any:
        return hidden_states


def _cache(tokens: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 4), 0)
    return cache


def test_arguments_have_their_names_however_they_come() -> None:
    cache = _cache(3)
    assert given_to(Before(), (1, cache), {"logits": 2}) == {"input_ids": 1, "past_key_values": cache, "logits": 2}
    assert given_to(After(), (1,), {"past_key_values": cache}) == {"input_ids": 1, "past_key_values": cache}
    assert given_to(Without(), (1,), {}) == {"hidden_states": 1}


def test_each_forward_says_what_it_calls_the_cache() -> None:
    assert [cache_name(each().forward) for each in (Before, After, Without)] == ["past_key_values", "cache", None]


@pytest.mark.parametrize(
    ("module", "name"), [(Before(), "past_key_values"), (After(), "cache"), (After(), "past_key_values")]
)
def test_the_tokens_of_a_cache_count_under_either_name(module: nn.Module, name: str) -> None:
    assert cached_tokens(given_to(module, (), {name: _cache(5)})) == 5
    assert cached_tokens(given_to(module, (), {name: None})) == 0
    assert cached_tokens(given_to(module, (), {})) == 0


def test_an_output_has_its_cache_under_either_name() -> None:
    cache = _cache(1)
    assert cache_of({"logits": 0, "cache": cache}) is cache_of({"past_key_values": cache}) is cache
