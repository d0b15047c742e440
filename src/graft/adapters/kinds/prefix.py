"""Prefix tuning: learned keys and values in front of every attention's own, K = [P_K; K], V = [P_V; V].

Li and Liang 2021, "Prefix-Tuning" (arXiv 2101.00190). With `projection` the prefix is the output of an MLP shared by all layers,
P = W2 tanh(W1 E), which a saved adapter no longer needs. A prefix can start as a cached prompt: the keys and values that the base
computes of a text, so that in a causal model a fresh adapter is the base with that text before its input.

Legend: P virtual tokens, L adapted layers, K key-value heads, D head size, E embedding width, M width of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import AdapterConfig, Shared
from graft.adapters.hooks import AttentionAdapter
from graft.adapters.parts.starting_text import ids_of, ready
from graft.architectures.site import SiteLike, SiteSpec, SiteType


class Prefix(AdapterConfig):
    """Virtual tokens in the keys and values of every layer."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"attention"})
    source = "arXiv 2101.00190"
    suits = "Steers a model without touching a weight or an activation; its tokens take room in the attention of every layer."

    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(default=30, ge=1)
    """Virtual tokens per layer."""
    projection: int | None = Field(default=None, ge=1)
    """Width of the MLP that produces the prefix while training; None trains the keys and values themselves."""
    init: Literal["normal", "text"] = "normal"
    """How it starts: normal with `init_std`, or as the base's keys and values of `init_ids` (with positions: after_prefix)."""
    init_std: float = Field(default=0.02, gt=0.0)
    """Standard deviation of `init: normal` (of the embedding, with a projection). LLM-Adapters and PEFT use 1."""
    init_text: str | None = None
    """What `init: text` starts from. A run turns it into `init_ids` with the base's tokenizer; in Python: `config.tokenised(tokenizer)`."""
    init_ids: tuple[int, ...] = ()
    """Token ids that `init: text` starts from, as many as `tokens`."""
    positions: Literal["zero", "after_prefix", "moved_keys"] = "zero"
    """Where the real sequence's positions start: at 0 (AdapterHub), or behind the virtual tokens (PEFT, LLM-Adapters). moved_keys is what
    AdapterHub computes on T5: the keys stand behind the virtual tokens, the queries at 0."""
    window: Literal["shows", "hides"] = "shows"
    """Whether a sliding window shows the virtual tokens to every token, or hides them as it hides real ones (PEFT; after_prefix only)."""
    sites: str | tuple[str, ...] = "attn"

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Prefix:
        if (self.init == "text") != bool(self.init_text or self.init_ids):
            raise ValueError("init: text and init_text (or init_ids) need each other")
        if self.init_ids and len(self.init_ids) != self.tokens:
            raise ValueError(
                f"the text to start from has {len(self.init_ids)} tokens: set tokens: {len(self.init_ids)}"
            )
        if self.positions != "after_prefix" and (self.init == "text" or self.window == "hides"):
            raise ValueError(
                "init: text and window: hides need positions: after_prefix, where the virtual tokens have positions"
            )
        if self.projection is not None and self.init == "text":
            raise ValueError("init: text sets the keys and values themselves, which a projection would produce")
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    @property
    def starts_from(self) -> tuple[int, ...]:
        return self.init_ids

    def tokenised(self, tokenizer: Any) -> Prefix:
        return self.model_validate({**self.model_dump(), "init_ids": ids_of(self, tokenizer)})

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        ready(self)

    def build(self, spec: SiteSpec) -> PrefixAdapter:
        return PrefixAdapter(self, spec)

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        return None if self.projection is None else PrefixProjection(self, specs)

    def collapsed(self) -> Prefix:
        return self.model_copy(update={"projection": None})


class PrefixProjection(Shared):
    """The MLP of the reparametrisation: embedding [P, E], down E -> M, up M -> sum over layers of 2 K D."""

    def __init__(self, config: Prefix, specs: Sequence[SiteSpec]) -> None:
        super().__init__()
        assert config.projection is not None
        like = {"dtype": specs[0].dtype, "device": specs[0].device}
        width = specs[0].in_features
        sizes = [2 * spec.num_kv_heads * spec.head_dim for spec in specs]
        self.ends = {spec.index: sum(sizes[: i + 1]) for i, spec in enumerate(specs)}
        self.embedding = nn.Parameter(torch.empty(config.tokens, width, **like).normal_(std=config.init_std))
        self.down = nn.Linear(width, config.projection, **like)
        self.up = nn.Linear(config.projection, sum(sizes), **like)

    def layer(self, index: int, size: int) -> Tensor:
        """The prefix [P, size] of one site; only its rows of `up` are computed."""
        rows = slice(self.ends[index] - size, self.ends[index])
        hidden_PM = torch.tanh(self.down(self.embedding))
        return F.linear(hidden_PM, self.up.weight[rows], self.up.bias[rows])


class PrefixAdapter(AttentionAdapter):
    """keys and values [P, K, D] of one layer, or, with a projection, its slice of the shared MLP."""

    def __init__(self, config: Prefix, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.shape = (config.tokens, spec.num_kv_heads, spec.head_dim)
        self.position_shift = {"zero": 0, "after_prefix": config.tokens, "moved_keys": -config.tokens}[config.positions]
        self.windowed = config.window == "hides"
        self.keys = self.values = None
        if config.projection is None:
            like = {"dtype": spec.dtype, "device": spec.device}
            self.keys = nn.Parameter(torch.empty(self.shape, **like).normal_(std=config.init_std))
            self.values = nn.Parameter(torch.empty(self.shape, **like).normal_(std=config.init_std))

    def start_at(self, keys: Tensor, values: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        each = keys.shape[1] // self.shape[1]  # Falcon's module holds a head once for each query head of its group
        with torch.no_grad():
            self.keys.copy_(keys[:, ::each])
            self.values.copy_(values[:, ::each])

    def keys_values(self) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            return self.keys, self.values
        tokens, heads, head_dim = self.shape
        (shared,) = self._shared
        assert isinstance(shared, PrefixProjection)
        flat_P = shared.layer(self.site_index, 2 * heads * head_dim).view(tokens, 2, heads, head_dim)
        return flat_P[:, 0], flat_P[:, 1]

    def to_save(self) -> dict[str, Tensor]:
        keys, values = self.keys_values()
        return {"keys": keys.detach(), "values": values.detach()}
