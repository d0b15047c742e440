"""LLaMA-Adapter: a second attention over learned prompts beside the module's own, behind a gate that starts at zero.

    A' = A(Q, K, V) + tanh(g) softmax(Q (P W_k)^T / sqrt(D)) P W_v        before W_o

The prompts' keys and values go through the layer's own frozen W_k and W_v (biases and the norm of keys included, where it has
them) and are not rotated; the softmax over prompts is apart from the one over tokens. Zhang et al. 2023, "LLaMA-Adapter: Efficient
Fine-tuning of Language Models with Zero-init Attention" (arXiv 2303.16199).

Legend: P prompts, C width of the layer, B rows, L length, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.hooks import AttentionAdapter
from graft.adapters.surroundings import Surroundings, frozen
from graft.architectures.layers import is_norm
from graft.architectures.site import SiteSpec, SiteType
from graft.errors import GraftError
from graft.routing.context import AdapterContext


class LLaMAAdapter(AdapterConfig):
    """A gated second attention over learned prompts in the topmost layers."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"attention"})
    source = "arXiv 2303.16199"
    suits = "Instruction following from a few prompts in the top layers; its gates begin at zero, so training begins at the base."

    kind: Literal["llama-adapter"] = "llama-adapter"
    tokens: int = Field(default=10, ge=1)
    """Prompts per layer."""
    gate: Literal["head", "layer"] = "head"
    """One gate per query head, or one per layer (PEFT)."""
    squash: Literal["tanh", "none"] = "tanh"
    """What the gate goes through: tanh (the paper's training code), or nothing (the paper's equation, PEFT)."""
    adds: Literal["before_o", "after_o"] = "before_o"
    """Whether the prompts' attention goes through the output projection, or is added behind it (PEFT on GPT-2)."""
    init_std: float = Field(default=1.0, gt=0.0)
    """Standard deviation of the initial prompts."""
    sites: str | tuple[str, ...] = "attn@last30"

    def build(self, spec: SiteSpec) -> LLaMAAdapterModule:
        return LLaMAAdapterModule(self, spec)


class LLaMAAdapterModule(AttentionAdapter):
    """prompts [P, C] and gate [H] or [1] of one layer."""

    def __init__(self, config: LLaMAAdapter, spec: SiteSpec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.shape, self.squash = (config.tokens, spec.num_kv_heads, spec.head_dim), config.squash == "tanh"
        self.adds_behind = config.adds == "after_o"
        self.left: dict[int, Tensor] = {}
        """What is added behind the output projection, from there to here."""
        self.prompts = nn.Parameter(torch.empty(config.tokens, spec.in_features, **like).normal_(std=config.init_std))
        self.gate = nn.Parameter(torch.zeros(spec.num_heads if config.gate == "head" else 1, **like))

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        name = type(around.host).__name__
        if missing := [letter for letter in ("kvo" if self.adds_behind else "kv") if letter not in around.projections]:
            raise GraftError(
                f"llama-adapter sends its prompts through the projections of keys and values, but Graft knows no '{missing[0]}' of "
                f"{name}: choose another kind (prefix)"
            )
        norms = {
            key: child for key, child in around.host.named_children() if is_norm(child) and not key.startswith("q")
        }
        tokens, heads, head_dim = self.shape
        known = {head_dim: (tokens, heads, head_dim), heads * head_dim: (tokens, heads * head_dim)}
        self.key_norm: tuple[Any, ...] = ()
        for key, norm in norms.items():
            size = norm.weight.numel()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            if not key.startswith("k") or size not in known:
                raise GraftError(
                    f"llama-adapter does not know what the norm '{key}' of {name} does to a prompt: choose kind prefix"
                )
            self.key_norm = (norm, known[size])

    def _keys_values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[P, K, D] each, as the frozen layer makes them of a token."""
        prompts_PC = self.prompts.to(dtype)
        keys, values = (self.around.projections[letter].apply(prompts_PC) for letter in "kv")
        if self.key_norm:
            norm, shape = self.key_norm
            keys = frozen(norm, keys.view(shape))
        return keys.view(self.shape), values.view(self.shape)

    def beside(self, query: Tensor, scaling: float, ctx: AdapterContext) -> Tensor:
        keys_PKD, values_PKD = self._keys_values(query.dtype)
        group = query.shape[2] // keys_PKD.shape[1]
        keys_PHD, values_PHD = (x.repeat_interleave(group, 1) for x in (keys_PKD, values_PKD))
        scores_BLHP = torch.einsum("blhd,phd->blhp", query, keys_PHD) * scaling
        weights_BLHP = torch.softmax(scores_BLHP, -1, dtype=torch.float32).to(query.dtype)
        gate = (torch.tanh(self.gate) if self.squash else self.gate).to(query.dtype)
        attended_BLHD = torch.einsum("blhp,phd->blhd", weights_BLHP, values_PHD) * gate[:, None]
        if not self.adds_behind:
            return attended_BLHD
        self.left[_run(ctx)] = attended_BLHD.flatten(2)
        return torch.zeros_like(attended_BLHD)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + self.left.pop(_run(ctx))


def _run(ctx: AdapterContext) -> int:
    """Which of the pass's groups of rows this is; a compiled graph has one."""
    return 0 if torch.compiler.is_compiling() else id(ctx)
