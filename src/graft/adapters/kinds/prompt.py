"""Prompt tuning: learned vectors before the embedded sequence, h_0 = [P; E(tokens)].

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv 2104.08691). In causal models the
vectors run through the model once per forward pass and every row sees their keys and values; in encoders they are prepended to each
row, and the encoder's output is cut to the caller's tokens. By default a sliding window does not hide them.

Legend: P virtual tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.hooks import EmbeddingAdapter
from graft.adapters.parts.starting_text import ids_of, ready
from graft.adapters.surroundings import Surroundings, frozen
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError


class PromptTuning(AdapterConfig):
    """Virtual tokens before the embedded sequence."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"embedding"})
    source = "arXiv 2104.08691"
    suits = "Among the smallest of all; its paper finds it level with full training on very large bases only."

    kind: Literal["prompt"] = "prompt"
    tokens: int = Field(default=20, ge=1)
    """Virtual tokens."""
    init: Literal["uniform", "normal", "vocabulary", "text"] = "uniform"
    """How they start: uniform in -0.5 to 0.5, normal with `init_std`, as random rows of the embedding, or as the embedded `init_ids`."""
    init_std: float = Field(default=0.02, gt=0.0)
    """Standard deviation of `init: normal`."""
    init_text: str | None = None
    """What `init: text` starts from. A run turns it into `init_ids` with the base's tokenizer; in Python: `config.tokenised(tokenizer)`."""
    init_ids: tuple[int, ...] = ()
    """Token ids that `init: text` starts from, repeated until there are enough. More than `tokens` is an error."""
    enters: Literal["embedding", "blocks"] = "embedding"
    """Whether the virtual tokens get positions of their own, before the sequence's (PEFT), or stand in front of an encoder's first block
    without any, and the sequence keeps its own (AdapterHub)."""
    window: Literal["shows", "hides"] = "shows"
    """Whether a sliding window of a causal base shows the virtual tokens to every token, or hides them as it hides real ones (PEFT)."""
    sites: str | tuple[str, ...] = "embed"

    @model_validator(mode="after")
    def _text_needs_a_text(self) -> PromptTuning:
        if (self.init == "text") != bool(self.init_text or self.init_ids):
            raise ValueError("init: text and init_text (or init_ids) need each other")
        if len(self.init_ids) > self.tokens:
            raise ValueError(
                f"the text to start from has {len(self.init_ids)} tokens, but there are {self.tokens} virtual tokens"
            )
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    def tokenised(self, tokenizer: Any) -> PromptTuning:
        return self.model_validate({**self.model_dump(), "init_ids": ids_of(self, tokenizer)})

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        if len(sites) > 1:
            raise GraftError(
                f"kind prompt takes one embedding; '{self.sites}' names {len(sites)}: {', '.join(site.module for site in sites)}"
            )
        ready(self)

    def build(self, spec: SiteSpec) -> PromptTuningAdapter:
        return PromptTuningAdapter(self, spec)


class PromptTuningAdapter(EmbeddingAdapter):
    """vectors [P, D]."""

    def __init__(self, config: PromptTuning, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.tokens, self.windowed, self.config = config.tokens, config.window == "hides", config
        self.behind_positions = config.enters == "blocks"
        vectors_PD = torch.empty(config.tokens, spec.out_features, dtype=spec.dtype, device=spec.device)
        std = config.init_std
        self.vectors = nn.Parameter(
            vectors_PD.normal_(std=std) if config.init == "normal" else vectors_PD.uniform_(-0.5, 0.5)
        )

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        if self.config.init in ("vocabulary", "text"):
            size = int(around.host.num_embeddings)  # pyright: ignore[reportArgumentType]
            ids_P = torch.randint(size, (self.tokens,)) if self.config.init == "vocabulary" else self._text_ids(size)
            with torch.no_grad():
                self.vectors.copy_(frozen(around.host, ids_P.to(self.vectors.device)))

    def _text_ids(self, size: int) -> Tensor:
        if unknown := [number for number in self.config.init_ids if not 0 <= number < size]:
            raise GraftError(f"init_ids: {unknown[0]} is no row of an embedding of {size}")
        ids = torch.tensor(self.config.init_ids)
        return ids.repeat(-(-self.tokens // len(ids)))[: self.tokens]

    def prompt(self) -> Tensor:
        return self.vectors
