"""The attention function: any backend's own function, given virtual keys and values, or one segment of a token-flat batch at a time.

Registered as `graft_<backend>` with transformers' attention interface. With nothing to add it calls the backend's function with the very
arguments it was given, so that off equals base bitwise.

Legend: B rows, H query heads, K key-value heads, L queries, S keys, T tokens of a flat batch, P virtual tokens, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.attention.alibi import Alibi
from graft.attention.relative import with_columns
from graft.attention.varlen import by_varlen, serves
from graft.attention.virtual import Virtual, virtual_tokens
from graft.errors import GraftError
from graft.injection.state import State
from graft.routing.context import ForwardContext

Attend = Callable[..., tuple[Tensor, Tensor | None]]
PREFIX = "graft_"
"""Of the names by which transformers knows these functions."""
BACKENDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
NO_PASS = ForwardContext()


def register() -> None:
    """Make the functions known to transformers (once; repeating is harmless)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for backend in BACKENDS:
        AttentionInterface.register(PREFIX + backend, _function(backend))
        if backend in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(PREFIX + backend, ALL_MASK_ATTENTION_FUNCTIONS[backend])


def _function(backend: str) -> Attend:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        return attend(module, backend, query, key, value, attention_mask, **kwargs)

    return attention


def backend_function(module: nn.Module, backend: str) -> Attend:
    """The backend's own function; eager attention is each model file's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[backend]
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return own or plain_attention


def current_context(module: nn.Module) -> ForwardContext:
    """The pass in effect for an attention module; a compiled graph cannot know it, and raises for one that is token-flat."""
    state: State = module.__dict__["graft_state"]
    if not torch.compiler.is_compiling():
        return state.current
    state.refuse_flat_in_graph()
    return NO_PASS


def attend(
    module: nn.Module,
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    alibi: Alibi | None = None,
    own: Callable[[], tuple[Tensor, Tensor | None]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with whatever the pass in effect adds. `own` is the model's own way, where it has one that no backend equals bit for bit:
    it serves when keys and values stay as they are.

    query [B, H, L, D], key and value [B, K, S, D], mask None, boolean or additive [B or 1, H or 1, L, S]; alibi whose bias a
    padded batch has in its mask already and a flat one does not. Returns output [B, L, H, D] and the weights, if the backend gives them.
    """
    state: State = module.__dict__["graft_state"]
    context = current_context(module)
    _cache_kv(module, state, context, key, value)
    output, weights = _with_virtual_tokens(module, backend, query, key, value, mask, alibi, own, kwargs)
    container: Any = module._modules.get("graft")
    if container is not None and container.hooks.second_attention:
        scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        output = container.add_second_attention(query.transpose(1, 2), scaling, output)
    return output, weights


def _cache_kv(module: nn.Module, state: State, context: ForwardContext, key: Tensor, value: Tensor) -> None:
    """While virtual tokens alone, or a text that some start from, run through the model: note keys and values [1, K, P, D] as they come."""
    compiling = torch.compiler.is_compiling()
    name, recording = (state.recording_in_graph or ("", None)) if compiling else (context.rows, context.recording)
    if recording is None:
        return
    if name is None:  # of the bare base, for adapters that start from it
        recording[module] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        return
    container: Any = module._modules["graft"]
    for adapter in container.hooks.keys_values.get(name, ()):
        if adapter.cached_kv and adapter not in recording:  # recomputed blocks come by again
            recording[adapter] = key[0].transpose(0, 1), value[0].transpose(0, 1)


def _with_virtual_tokens(
    module: nn.Module, backend: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, alibi: Alibi | None,
    own: Callable[[], tuple[Tensor, Tensor | None]] | None, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    state: State = module.__dict__["graft_state"]
    function, context = backend_function(module, backend), current_context(module)
    virtual = virtual_tokens(module, state, context, query.shape[0])
    if context.flat:
        return _by_segments(module, backend, function, query, key, value, context, virtual, alibi, kwargs), None
    if virtual is None:
        return function(module, query, key, value, mask, **kwargs) if own is None else own()
    if backend == "flex_attention":
        raise GraftError(
            "virtual tokens do not run under flex_attention: load the base with attention sdpa, eager or flash_attention_2"
        )
    rows = virtual.of_rows(query.shape[0], key.shape[1])
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = with_columns(module, bias, rows, query, key)
    if backend.startswith("flash"):
        if kwargs.get("cu_seq_lens_k") is not None:
            raise GraftError(
                "virtual tokens in rows that a trainer packed need attention sdpa or eager: flash attention would give them to the "
                "first sequence alone"
            )
        if kwargs.get("sliding_window"):
            raise GraftError(
                "virtual tokens under a sliding window need attention sdpa or eager: flash attention would hide them"
            )
        mask = None if mask is None and rows.always_visible else _flash_mask(mask, rows, key)
    else:
        seen = rows.seen(kwargs.get("position_ids"), kwargs.get("sliding_window"))
        mask = _with_prefix(_explicit(module, mask, query, key, kwargs), rows, seen, query.dtype, alibi)
        kwargs["is_causal"] = False
    key, value = torch.cat([rows.keys.to(key), key], 2), torch.cat([rows.values.to(value), value], 2)
    output, weights = function(module, query, key, value, mask, **kwargs)
    return output, None if weights is None else weights[..., rows.count :]


def _explicit(module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The mask that `None` stands for: causal from the upper left, or everything for a single query or an encoder."""
    if mask is not None:
        return mask[..., : key.shape[2]]
    length, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    allowed = torch.ones(length, keys, dtype=torch.bool, device=query.device)
    return (allowed.tril() if causal and length > 1 else allowed)[None, None]


def _with_prefix(mask: Tensor, rows: Virtual, seen: Tensor, dtype: torch.dtype, alibi: Alibi | None) -> Tensor:
    """The mask with columns for the virtual tokens, seen [B, L or 1, P]; bias 0, or ALiBi's where positions start behind the prefix."""
    visible = seen[:, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    if mask.dtype == torch.bool and alibi is None:
        return torch.cat([visible, mask.expand(visible.shape[0], -1, -1, -1)], -1)
    least = torch.finfo(dtype).min
    columns = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, least)
    if alibi is not None:
        columns = columns + alibi.bias(rows.offsets, dtype)
    mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, least) if mask.dtype == torch.bool else mask
    heads, batch = max(mask.shape[1], columns.shape[1]), max(mask.shape[0], columns.shape[0])
    return torch.cat([columns.expand(batch, heads, -1, -1), mask.expand(batch, heads, -1, -1)], -1)


def _flash_mask(mask: Tensor | None, rows: Virtual, key: Tensor) -> Tensor:
    """Flash attention takes [B, S] with 1 at real tokens."""
    real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device) if mask is None else mask.bool()
    return torch.cat([rows.visible, real], 1)


def _by_segments(
    module: nn.Module, backend: str, function: Attend, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext,
    virtual: Virtual | None, alibi: Alibi | None, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Attention inside each segment of a flat batch. Splitting (not slicing) keeps the backward pass one concatenation."""
    assert context.lengths is not None
    if not getattr(module, "is_causal", True):
        raise GraftError(f"{type(module).__name__} is not causal: token-flat batches are for causal models")
    if kwargs.get("position_bias") is not None:
        raise GraftError(
            f"{type(module).__name__} adds a bias by relative position, which token-flat batches do not have"
        )
    kwargs = {
        name: item
        for name, item in kwargs.items()
        if not name.startswith(("cu_seq_lens", "max_length", "position_ids"))
    }
    window, outputs = kwargs.get("sliding_window"), []
    if virtual is None and alibi is None and backend == "sdpa" and serves(query, kwargs):
        return by_varlen(query, key, value, context.lengths, kwargs.get("scaling"), window)
    rows = None if virtual is None else virtual.of_rows(len(context.lengths), key.shape[1])
    for row, (q, k, v) in enumerate(
        zip(*(part.split(list(context.lengths), 2) for part in (query, key, value)), strict=True)
    ):
        length = q.shape[2]
        one = None if rows is None else rows.row(row)
        if one is None and alibi is None and backend != "eager" and not (window and window < length):
            outputs.append(function(module, q, k, v, None, **kwargs)[0])
            continue
        allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if window and window < length:
            allowed = allowed.triu(1 - window)
        mask = q.new_zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(q.dtype).min)
        if alibi is not None:
            mask = mask + alibi.bias(torch.arange(length, device=q.device), q.dtype)
        if one is not None:
            places = torch.arange(length, device=q.device)[None]
            mask = _with_prefix(mask, one, one.seen(places - one.offsets.amin(), window), q.dtype, alibi)
            k, v = torch.cat([one.keys.to(k), k], 2), torch.cat([one.values.to(v), v], 2)
        if backend.startswith("flash"):
            raise GraftError("virtual tokens, ALiBi and windows in token-flat batches need attention sdpa or eager")
        outputs.append(function(module, q, k, v, mask, **{**kwargs, "is_causal": False})[0])
    return torch.cat(outputs, 1)


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q k^T * scaling + mask) v with the softmax in float32, for models without an eager function of their own."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def needed(module: Any) -> bool:
    """True for a token-flat pass, or when an adapter that takes part acts in this attention."""
    container, context = module._modules.get("graft"), current_context(module)
    table = {} if container is None else {**container.hooks.keys_values, **container.hooks.second_attention}
    if torch.compiler.is_compiling():
        return bool(table)
    unmerged = module.__dict__["graft_state"].merged is None
    return context.flat or context.recording is not None or unmerged and any(name in context.names for name in table)
