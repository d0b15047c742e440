"""Prompt tuning: learned vectors before the embedded sequence, h_0 = [P; E(tokens)].

In causal models the vectors run through the model once per forward pass, and every row of the batch sees their keys and values. In encoders
they are prepended to each row, and the encoder's output is cut back to the caller's tokens. By default a sliding window does not hide them.

Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv 2104.08691).

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
from graft.adapters.parts.starting_text import require_ids, text_ids
from graft.adapters.surroundings import Surroundings, frozen
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError


class PromptTuning(AdapterConfig):
    """Virtual tokens before the embedded sequence."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"embedding"})
    source = "arXiv 2104.08691"
    suits = "One of the smallest kinds. In its paper it matches full fine-tuning only on very large bases."

    kind: Literal["prompt"] = "prompt"
    tokens: int = Field(default=20, ge=1)
    """Number of virtual tokens."""
    init: Literal["uniform", "normal", "vocabulary", "text"] = "uniform"
    """Initial vectors. uniform: from -0.5 to 0.5. normal: with `init_std`. vocabulary: random rows of the embedding. text: the embedded
    `init_ids`."""
    init_std: float = Field(default=0.02, gt=0.0)
    """Standard deviation of `init: normal`."""
    init_text: str | None = None
    """Text for `init: text`. A run turns it into `init_ids` with the base's tokenizer. In Python, use `config.tokenised(tokenizer)`."""
    init_ids: tuple[int, ...] = ()
    """Token ids for `init: text`, repeated until there are `tokens` of them. More than `tokens` is an error."""
    enters: Literal["embedding", "blocks"] = "embedding"
    """Where the virtual tokens enter. embedding: before the sequence, with positions of their own (PEFT). blocks: before the first block
    of an encoder, without positions, so that the sequence keeps its own (AdapterHub)."""
    window: Literal["shows", "hides"] = "shows"
    """What the sliding window of a causal base does with the virtual tokens. shows: every token sees them. hides: it hides them like real
    tokens (PEFT)."""
    sites: str | tuple[str, ...] = "embed"

    @model_validator(mode="after")
    def _text_needs_a_text(self) -> PromptTuning:
        if (self.init == "text") != bool(self.init_text or self.init_ids):
            raise ValueError("init: text and init_text (or init_ids) need each other: give both or neither")
        if len(self.init_ids) > self.tokens:
            raise ValueError(
                f"the text to start from has {len(self.init_ids)} tokens, but there are {self.tokens} virtual tokens"
            )
        return self

    @property
    def starts_as_identity(self) -> bool:
        return False

    def tokenised(self, tokenizer: Any) -> PromptTuning:
        return self.model_validate({**self.model_dump(), "init_ids": text_ids(self, tokenizer)})

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        if len(sites) > 1:
            raise GraftError(
                f"kind prompt takes one embedding, but '{self.sites}' names {len(sites)}: {', '.join(site.module for site in sites)}"
            )
        require_ids(self)

    def build(self, spec: SiteSpec) -> PromptTuningAdapter:
        return PromptTuningAdapter(self, spec)


class PromptTuningAdapter(EmbeddingAdapter):
    """The vectors [P, D]."""

    def __init__(self, config: PromptTuning, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.tokens, self.windowed, self.config = config.tokens, config.window == "hides", config
        self.after_positions = config.enters == "blocks"
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
        """Repeat `init_ids` to P ids: (7, 8) become 7 8 7 8 7 for P = 5. `size` is the number of rows of the embedding."""
        if unknown := [number for number in self.config.init_ids if not 0 <= number < size]:
            raise GraftError(f"init_ids: {unknown[0]} is no row of an embedding of {size} rows")
        ids = torch.tensor(self.config.init_ids)
        return ids.repeat(-(-self.tokens // len(ids)))[: self.tokens]

    def prompt(self) -> Tensor:
        return self.vectors
