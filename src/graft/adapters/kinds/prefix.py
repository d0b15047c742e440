"""Prefix tuning: learned keys and values before those of every attention, K' = [P_K; K] and V' = [P_V; V].

With `projection` the prefix is the output of an MLP that all layers share, P = W2 tanh(W1 E). A saved adapter holds the result and no MLP.
A prefix can start from a text (`init: text`): it then begins as the keys and values that the base computes for it. In a causal model a
fresh adapter then equals the base with that text before its input.

Li and Liang 2021, "Prefix-Tuning" (arXiv 2101.00190).

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
from graft.adapters.hooks import ALL_ROWS, AttentionAdapter
from graft.adapters.parts.starting_text import require_ids, text_ids
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.routing.context import AdapterContext


class Prefix(AdapterConfig):
    """Virtual tokens in the keys and values of every layer."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"attention"})
    source = "arXiv 2101.00190"
    suits = "Steers a model without changing weights or activations. Its tokens take up room in the attention of every layer."

    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(default=30, ge=1)
    """Number of virtual tokens per layer."""
    projection: int | None = Field(default=None, ge=1)
    """Width of the MLP that produces the prefix in training. None: train the keys and values themselves."""
    init: Literal["normal", "text"] = "normal"
    """Initial values. normal: with `init_std`. text: the base's keys and values for `init_ids` (needs positions: after_prefix)."""
    init_std: float = Field(default=0.02, gt=0.0)
    """Standard deviation of `init: normal` (with a projection, that of its embedding). LLM-Adapters and PEFT use 1."""
    init_text: str | None = None
    """Text for `init: text`. A run turns it into `init_ids` with the base's tokenizer. In Python, use `config.tokenised(tokenizer)`."""
    init_ids: tuple[int, ...] = ()
    """Token ids for `init: text`, exactly `tokens` of them."""
    positions: Literal["zero", "after_prefix", "moved_keys"] = "zero"
    """Where the positions of the real sequence start. zero: at 0 (AdapterHub). after_prefix: after the virtual tokens (PEFT, LLM-Adapters).
    moved_keys: after the virtual tokens for keys, at 0 for queries, which is what AdapterHub computes on T5."""
    window: Literal["shows", "hides"] = "shows"
    """What a sliding window does with the virtual tokens. shows: every token sees them. hides: it hides them like real tokens (PEFT; only
    with positions: after_prefix)."""
    sites: str | tuple[str, ...] = "attn"

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Prefix:
        if (self.init == "text") != bool(self.init_text or self.init_ids):
            raise ValueError("init: text and init_text (or init_ids) need each other: give both or neither")
        if self.init_ids and len(self.init_ids) != self.tokens:
            raise ValueError(
                f"the text to start from has {len(self.init_ids)} tokens: set tokens: {len(self.init_ids)}"
            )
        if self.positions != "after_prefix" and (self.init == "text" or self.window == "hides"):
            raise ValueError(
                "init: text and window: hides need positions: after_prefix, because only there virtual tokens have positions"
            )
        if self.projection is not None and self.init == "text":
            raise ValueError(
                "init: text sets the keys and values themselves, but a projection produces them: leave out one of the two"
            )
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    @property
    def starts_from(self) -> tuple[int, ...]:
        return self.init_ids

    def tokenised(self, tokenizer: Any) -> Prefix:
        return self.model_validate({**self.model_dump(), "init_ids": text_ids(self, tokenizer)})

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        require_ids(self)

    def build(self, spec: SiteSpec) -> PrefixAdapter:
        return PrefixAdapter(self, spec)

    def build_shared(self, specs: Sequence[SiteSpec]) -> Shared | None:
        return None if self.projection is None else PrefixProjection(self, specs)

    def collapsed(self) -> Prefix:
        return self.model_copy(update={"projection": None})


class PrefixProjection(Shared):
    """The shared MLP: embedding [P, E], down E -> M, up M -> 2 K D for each of the L layers, end to end."""

    def __init__(self, config: Prefix, specs: Sequence[SiteSpec]) -> None:
        super().__init__()
        assert config.projection is not None
        like = {"dtype": specs[0].dtype, "device": specs[0].device}
        width = specs[0].in_features
        sizes = [spec.num_kv_heads * (spec.head_dim + spec.value_dim) for spec in specs]
        self.ends = {
            spec.index: sum(sizes[: i + 1]) for i, spec in enumerate(specs)
        }  # where each layer's slice of `up` ends
        self.embedding = nn.Parameter(torch.empty(config.tokens, width, **like).normal_(std=config.init_std))
        self.down = nn.Linear(width, config.projection, **like)
        self.up = nn.Linear(config.projection, sum(sizes), **like)

    def layer(self, index: int, size: int) -> Tensor:
        """Return the prefix [P, size] of one site, using only the output features of `up` that belong to it."""
        features = slice(self.ends[index] - size, self.ends[index])
        hidden_PM = torch.tanh(self.down(self.embedding))  # [P, E] -> [P, M]
        return F.linear(hidden_PM, self.up.weight[features], self.up.bias[features])


class PrefixAdapter(AttentionAdapter):
    """keys [P, K, D] and values of one layer (of another size in latent attention). With a projection, the shared MLP produces them."""

    def __init__(self, config: Prefix, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.shape = (config.tokens, spec.num_kv_heads, spec.head_dim)
        self.value_shape = (config.tokens, spec.num_kv_heads, spec.value_dim)
        self.position_shift = {"zero": 0, "after_prefix": config.tokens, "moved_keys": -config.tokens}[config.positions]
        self.windowed = config.window == "hides"
        self.keys = self.values = None
        if config.projection is None:
            like = {"dtype": spec.dtype, "device": spec.device}
            self.keys = nn.Parameter(torch.empty(self.shape, **like).normal_(std=config.init_std))
            self.values = nn.Parameter(torch.empty(self.value_shape, **like).normal_(std=config.init_std))

    def start_at(self, keys: Tensor, values: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        # Falcon's attention repeats each key-value head for every query head of its group: keep one copy.
        copies = keys.shape[1] // self.shape[1]
        with torch.no_grad():
            self.keys.copy_(keys[:, ::copies])
            self.values.copy_(values[:, ::copies])

    def keys_values(self, x: Tensor | None = None, ctx: AdapterContext = ALL_ROWS) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            return self.keys, self.values
        _, heads, head_dim = self.shape
        (shared,) = self._shared
        assert isinstance(shared, PrefixProjection)
        both = shared.layer(self.site_index, heads * (head_dim + self.value_shape[-1]))
        keys, values = both.split([heads * head_dim, heads * self.value_shape[-1]], 1)
        return keys.view(self.shape), values.view(self.value_shape)

    def to_save(self) -> dict[str, Tensor]:
        keys, values = self.keys_values()
        return {"keys": keys.detach(), "values": values.detach()}
