"""P-tuning: virtual tokens before the sequence, produced by a small encoder: P = MLP(E) or P = MLP(BiLSTM(E)).

The encoder serves training only: a saved adapter is a plain prompt. Liu et al. 2021, "GPT Understands, Too" (arXiv 2103.10385).

Legend: P virtual tokens, D embedding width, M hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.hooks import EmbeddingAdapter
from graft.adapters.kinds.prompt import PromptTuning
from graft.architectures.site import SiteLike, SiteSpec, SiteType
from graft.errors import GraftError


class PTuning(AdapterConfig):
    """Virtual tokens before the embedded sequence, produced by an encoder."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"embedding"})
    source = "arXiv 2103.10385"
    suits = "Prompt tuning with an encoder that makes it easier to train. Only the prompt itself is saved."

    kind: Literal["p-tuning"] = "p-tuning"
    tokens: int = Field(default=20, ge=1)
    """Number of virtual tokens."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """mlp: three linear layers. lstm: a bidirectional LSTM and two linear layers."""
    hidden: int = Field(default=128, ge=1)
    """Width of the encoder. The LSTM has this width in each direction."""
    lstm_layers: int = Field(default=2, ge=1)
    """Number of layers of the LSTM."""
    window: Literal["shows", "hides"] = "shows"
    """What the sliding window of a causal base does with the virtual tokens. shows: every token sees them. hides: it hides them like real
    tokens (PEFT)."""
    sites: str | tuple[str, ...] = "embed"

    @property
    def starts_as_identity(self) -> bool:
        return False

    def check_sites(self, sites: Sequence[SiteLike]) -> None:
        self.collapsed().check_sites(sites)
        if self.encoder == "mlp" and "lstm_layers" in self.model_fields_set and self.lstm_layers != 2:
            raise GraftError("lstm_layers: has no effect with encoder: mlp; choose encoder: lstm")

    def build(self, spec: SiteSpec) -> PTuningAdapter:
        return PTuningAdapter(self, spec)

    def collapsed(self) -> PromptTuning:
        return PromptTuning(tokens=self.tokens, window=self.window, sites=self.sites)


class PTuningAdapter(EmbeddingAdapter):
    """embedding [P, D], and the encoder D -> M -> D."""

    def __init__(self, config: PTuning, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.tokens, self.windowed = config.tokens, config.window == "hides"
        width, hidden = spec.out_features, config.hidden
        like = {"dtype": spec.dtype, "device": spec.device}
        self.embedding = nn.Parameter(torch.empty(config.tokens, width, **like).normal_())
        self.lstm = None
        if config.encoder == "lstm":
            self.lstm = nn.LSTM(width, hidden, config.lstm_layers, bidirectional=True, batch_first=True, **like)
            self.mlp = nn.Sequential(
                nn.Linear(2 * hidden, 2 * hidden, **like), nn.ReLU(), nn.Linear(2 * hidden, width, **like)
            )
        else:
            self.mlp = nn.Sequential(
                nn.Linear(width, hidden, **like), nn.ReLU(), nn.Linear(hidden, hidden, **like), nn.ReLU(), nn.Linear(hidden, width, **like)
            )  # fmt: skip

    def prompt(self) -> Tensor:
        # [P, D], or [P, 2M] of an LSTM
        hidden = self.embedding if self.lstm is None else self.lstm(self.embedding[None])[0][0]
        return self.mlp(hidden)

    def to_save(self) -> dict[str, Tensor]:
        # As in evaluation: with gradients the LSTM may run in another kernel, which rounds differently.
        with torch.no_grad():
            return {"vectors": self.prompt()}
