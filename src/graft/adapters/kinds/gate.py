"""A gate around another adapter: one number between 0 and 1 per row or token, learned from the activations, scales what it does.

    around a module      h' = h + g (adapt(x, h) - h),   x' = x + g (before(x) - x)
    around a prefix      K' = [g P_K; K],   V' = [g P_V; V]
    around a second attention      its output times g
    g = sigmoid(w u + b) of each token, with `per: row` the mean of these over the row's tokens

u is the site's input x or its output h (a bottleneck with `reads: stream` reads h + r after the norm, and so does its gate). UniPELT puts
gates around a prefix, LoRA at q and v, and a bottleneck, and its gate replaces LoRA's scale. A gate depends on the input, so it cannot be
merged. With `per: row` every token depends on the whole row: that fits encoders. A causal model generates token by token, so there
it would compute other gates than in training, and is refused.

Mao et al. 2022, "UniPELT" (arXiv 2110.07577).

Legend: R rows, L length, D features of u; P virtual tokens, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graft.adapters.base import Adapter, CannotFold
from graft.adapters.composite import Composite, Wrapper, WrapsAttention, wrap
from graft.adapters.hooks import ALL_ROWS, AttentionAdapter, EmbeddingAdapter
from graft.adapters.surroundings import Surroundings
from graft.architectures.site import SiteSpec
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class Gate(Composite):
    """Gate around any adapter: it learns from the activations how much of the adapter to use."""

    source = "arXiv 2110.07577"
    suits = "One more vector per site; the model turns an adapter up or down by the input. It cannot be merged."

    kind: Literal["gate"] = "gate"
    reads: Literal["input", "output"] = "input"
    """What the gate reads: the site's input or its output. In an attention (prefix) it can read the input only."""
    per: Literal["row", "token"] = "row"
    """row: one gate for all tokens of a row, the mean of theirs (encoders). token: each token has its own (not around a prefix)."""
    mean: Literal["tokens", "positions"] = "tokens"
    """What the mean of a row runs over. tokens: its real tokens. positions: padding too, as UniPELT's code and AdapterHub have it. Only the
    latter is allowed in a causal model, to run AdapterHub's folders: it sees the tokens to come, and refuses to continue a cache."""
    scales: Literal["change", "output"] = "change"
    """change: what the adapter changes, h + g (h' - h). output: all of its output, g h', as AdapterHub gates (IA)3."""
    init_std: float = Field(default=0.02, ge=0.0)
    """Standard deviation of the initial gate weights w."""
    init_bias: float = 0.0
    """Initial bias b. 0 starts at gates of about a half."""

    @model_validator(mode="after")
    def _has_something_to_gate(self) -> Gate:
        if self.per == "token" and self.mean == "positions":
            raise ValueError("mean: positions is for per: row; with per: token there is no mean")
        if self.of.replaces:
            raise ValueError(
                f"kind {self.of.kind} replaces weights of the base, so there is no base output to mix it with"
            )
        return self

    @property
    def starts_as_identity(self) -> bool:
        return self.of.starts_as_identity and self.scales == "change"

    @classmethod
    def example(cls) -> dict[str, Any]:
        return {
            "kind": "gate",
            "of": {"kind": "lora", "rank": 8, "alpha": 8.0, "sites": "attn.q attn.v"},
            "per": "token",
        }

    def build(self, spec: SiteSpec) -> Adapter:
        of = self.of.build(spec)
        if spec.type == "embedding" and self.reads == "input" and not isinstance(of, EmbeddingAdapter):
            raise GraftError(f"'{spec.name}' gets token ids, which a gate cannot read: set reads: output")
        return wrap(
            spec,
            of,
            around=GateAround,
            attention=GateInAttention,
            prompt=None,
            experts=None,
            config=self,
        )


class SigmoidGate(nn.Module):
    """sigmoid(w u + b) with weight [1, D] and bias [1], in float32 or better."""

    def __init__(self, config: Gate, spec: SiteSpec) -> None:
        super().__init__()
        like = {"dtype": spec.dtype, "device": spec.device}
        width = spec.in_features if config.reads == "input" else spec.out_features
        self.per: Literal["row", "token"] = config.per
        self.mean: Literal["tokens", "positions"] = config.mean
        self.causal = False
        self.weight = nn.Parameter(torch.empty(1, width, **like).normal_(std=config.init_std))
        self.bias = nn.Parameter(torch.full((1,), config.init_bias, **like))

    def of_rows(self, u: Tensor, ctx: AdapterContext) -> Tensor:
        """Return the mean gate of each row. u: [R, L, D] or padding-free [1, T, D] -> [R, 1]."""
        if self.causal and torch.compiler.is_compiling():
            raise GraftError(
                "a gate per row in a causal model does not run compiled, because a graph does not know whether it continues a cache: "
                "set per: token"
            )
        return ctx.mean(self._of_each(u), over=self.mean)

    def of_tokens(self, u: Tensor, ctx: AdapterContext) -> Tensor:
        """Return the gate of each token, [..., 1], or of its row, in a shape that multiplies u."""
        return self._of_each(u) if self.per == "token" else ctx.spread(self.of_rows(u, ctx), u)

    def _of_each(self, u: Tensor) -> Tensor:
        logits = F.linear(u, self.weight.to(u.dtype), self.bias.to(u.dtype))
        return torch.sigmoid(logits.to(torch.promote_types(u.dtype, torch.float32)))


class Gated(Wrapper):
    """What gates share, wherever they act."""

    def __init__(self, spec: SiteSpec, of: Adapter, config: Gate) -> None:
        super().__init__(spec, of)  # pyright: ignore[reportArgumentType]
        self.gate, self.site, self.config = SigmoidGate(config, spec), spec.module, config
        self.reads_mask = self.reads_mask or config.per == "row"

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        self.gate.causal = around.causal
        if around.causal and self.gate.per == "row" and self.gate.mean == "tokens":
            raise GraftError(
                f"gate: per: row takes the mean over a whole row, but at '{self.site}' a token sees earlier tokens only, and generation "
                "computes it before the later ones exist: set per: token (a prefix, whose tokens all queries share, cannot have that)"
            )

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise self.cannot_fold()

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise self.cannot_fold()

    def fold_all(self) -> dict[str, Tensor] | None:
        raise self.cannot_fold()

    def cannot_fold(self) -> CannotFold:
        return CannotFold(
            "a gate depends on the input, so it has no equal in the base's weights and cannot be merged: keep the adapter beside the base "
            "(graft.load, graft chat, graft eval)"
        )

    @property
    def replaces_rows(self) -> Sequence[int]:
        return ()

    def low_rank(self, ctx: AdapterContext, rows: slice | None = None) -> None:
        return None


class GateAround(Gated):
    """A gate around an adapter that changes the input or the output of a module."""

    def __init__(self, spec: SiteSpec, of: Adapter, config: Gate) -> None:
        super().__init__(spec, of, config)
        if config.reads == "input" and self.reads == "nothing":
            self.reads = "input"

    def before(self, x: Tensor, ctx: AdapterContext) -> Tensor:
        changed = self.of.before(x, ctx)
        if changed is x:
            return x
        if self.config.reads == "output" or self.config.scales == "output":
            raise GraftError(
                f"gate: kind {self.config.of.kind} changes the input at '{self.site}', before there is an output: set reads: input and "
                "scales: change"
            )
        return self._mixed(x, changed, x, ctx)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        if self.config.scales == "change" and (update := self.of.low_rank(ctx)) is not None:
            x = x.to(h.dtype)
            return h + update.plain(x, self.gate.of_tokens(self._read(x, h), ctx).to(h.dtype))
        changed = self.of.adapt(x, h, ctx)
        return h if changed is h else self._mixed(h, changed, self._read(x, h), ctx)

    def _read(self, x: Tensor, h: Tensor) -> Tensor:
        """Return what the gate of an output reads."""
        return x if self.config.reads == "input" else self.of.output_read(x, h)

    def _mixed(self, plain: Tensor, changed: Tensor, u: Tensor, ctx: AdapterContext) -> Tensor:
        """Return what lies between the base's own and the changed one. u: what the gate reads."""
        g = self.gate.of_tokens(u, ctx).to(plain.dtype)
        return g * changed if self.config.scales == "output" else plain + g * (changed - plain)


class GateInAttention(Gated, WrapsAttention):
    """A gate around a prefix or a second attention. It reads the attention's input, in a causal decoder the normed one."""

    of: AttentionAdapter

    def __init__(self, spec: SiteSpec, of: AttentionAdapter, config: Gate) -> None:
        super().__init__(spec, of, config)
        wrong = {
            "reads: output is after the softmax in which the adapter acts: set reads: input": config.reads == "output",
            "per: token has no meaning for keys and values that all tokens of a row share: set per: row (in encoders)": (
                config.per == "token" and not of.adds_attention
            ),
            "the adapter acts after the output projection (adds: after_o), which a gate does not reach": of.adapts_output_projection,
        }
        if reasons := [reason for reason, holds in wrong.items() if holds]:
            raise GraftError(f"gate around {config.of.kind}: {'; '.join(reasons)}")
        self.reads, self.per_row = "input", not of.adds_attention

    def keys_values(self, x: Tensor | None = None, ctx: AdapterContext = ALL_ROWS) -> tuple[Tensor, Tensor]:
        assert x is not None
        g_R111 = self.gate.of_rows(x, ctx)[..., None, None]
        keys, values = self.of.keys_values(x, ctx)  # [P, K, D], or [R, P, K, D] if the inner one depends on the row too
        return g_R111.to(keys.dtype) * keys, g_R111.to(values.dtype) * values

    def beside(self, query: Tensor, scaling: float, ctx: AdapterContext, x: Tensor | None = None) -> Tensor:
        assert x is not None
        second = self.of.beside(query, scaling, ctx, x)
        return self.gate.of_tokens(x, ctx)[..., None].to(second.dtype) * second
