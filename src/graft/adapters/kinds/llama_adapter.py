"""LLaMA-Adapter: a second attention over learned prompts beside the module's own, with a gate that starts at zero.

    A' = A(Q, K, V) + tanh(g) softmax(Q (P W_k)^T / sqrt(D)) P W_v        before W_o

The prompts pass through the layer's own frozen W_k and W_v, with their biases and the norm of keys if it has them. Their keys are not
rotated. The softmax over the prompts is separate from the one over the tokens.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention" (arXiv 2303.16199).

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
    """Gated second attention over learned prompts in the topmost layers."""

    takes: ClassVar[frozenset[SiteType]] = frozenset({"attention"})
    source = "arXiv 2303.16199"
    suits = "Instruction following with a few prompts in the top layers. The gates start at zero, so training starts at the base."

    kind: Literal["llama-adapter"] = "llama-adapter"
    tokens: int = Field(default=10, ge=1)
    """Number of prompts per layer."""
    gate: Literal["head", "layer"] = "head"
    """head: one gate per query head. layer: one gate per layer (PEFT)."""
    squash: Literal["tanh", "none"] = "tanh"
    """Function of the gate. tanh: as in the paper's training code. none: as in the paper's equation and PEFT."""
    adds: Literal["before_o", "after_o"] = "before_o"
    """before_o: the prompts' attention passes through the output projection. after_o: it is added after the projection (PEFT on GPT-2)."""
    init_std: float = Field(default=1.0, gt=0.0)
    """Standard deviation of the initial prompts."""
    sites: str | tuple[str, ...] = "attn@last30"

    def build(self, spec: SiteSpec) -> LLaMAAdapterModule:
        return LLaMAAdapterModule(self, spec)


class LLaMAAdapterModule(AttentionAdapter):
    """prompts [P, C], and gate [H] or [1], of one layer."""

    def __init__(self, config: LLaMAAdapter, spec: SiteSpec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.dtype, "device": spec.device}
        self.shape, self.squash = (config.tokens, spec.num_kv_heads, spec.head_dim), config.squash == "tanh"
        self.adapts_output_projection = config.adds == "after_o"
        self.pending: dict[int, Tensor] = {}
        """The prompts' attention that `beside` computed and `adapt` adds after the output projection, by `_run`."""
        self.prompts = nn.Parameter(torch.empty(config.tokens, spec.in_features, **like).normal_(std=config.init_std))
        self.gate = nn.Parameter(torch.zeros(spec.num_heads if config.gate == "head" else 1, **like))

    def on_install(self, around: Surroundings) -> None:
        super().on_install(around)
        name = type(around.host).__name__
        if missing := [
            letter for letter in ("kvo" if self.adapts_output_projection else "kv") if letter not in around.projections
        ]:
            raise GraftError(
                f"llama-adapter sends its prompts through the layer's projections, but Graft does not know the '{missing[0]}' projection "
                f"of {name}: choose another kind, such as prefix"
            )
        norms = {
            key: child for key, child in around.host.named_children() if is_norm(child) and not key.startswith("q")
        }
        # A norm of keys acts on each head, or on all heads joined. Its size tells which shape it wants.
        tokens, heads, head_dim = self.shape
        known = {head_dim: (tokens, heads, head_dim), heads * head_dim: (tokens, heads * head_dim)}
        self.key_norm: tuple[Any, ...] = ()
        for key, norm in norms.items():
            size = norm.weight.numel()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            if not key.startswith("k") or size not in known:
                raise GraftError(
                    f"llama-adapter does not know what the norm '{key}' of {name} does to a prompt: choose another kind, such as prefix"
                )
            self.key_norm = (norm, known[size])

    def _keys_values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the prompts' keys and values [P, K, D], made by the frozen layer as it makes those of a token."""
        prompts_PC = self.prompts.to(dtype)
        keys, values = (self.around.projections[letter].apply(prompts_PC) for letter in "kv")
        if self.key_norm:
            norm, shape = self.key_norm
            keys = frozen(norm, keys.view(shape))
        return keys.view(self.shape), values.view(self.shape)

    def beside(self, query: Tensor, scaling: float, ctx: AdapterContext, x: Tensor | None = None) -> Tensor:
        keys_PKD, values_PKD = self._keys_values(query.dtype)
        group = query.shape[2] // keys_PKD.shape[1]  # query heads that share a key-value head
        keys_PHD, values_PHD = (x.repeat_interleave(group, 1) for x in (keys_PKD, values_PKD))
        scores_BLHP = torch.einsum("blhd,phd->blhp", query, keys_PHD) * scaling
        weights_BLHP = torch.softmax(scores_BLHP, -1, dtype=torch.float32).to(query.dtype)
        gate = (torch.tanh(self.gate) if self.squash else self.gate).to(query.dtype)
        attended_BLHD = torch.einsum("blhp,phd->blhd", weights_BLHP, values_PHD) * gate[:, None]
        if not self.adapts_output_projection:
            return attended_BLHD
        # A zero goes to the projection instead.
        self.pending[_run(ctx)] = attended_BLHD.flatten(2)
        return torch.zeros_like(attended_BLHD)

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + self.pending.pop(_run(ctx))


def _run(ctx: AdapterContext) -> int:
    """Return a key for the group of rows that is being computed. A compiled graph has only one group."""
    return 0 if torch.compiler.is_compiling() else id(ctx)
