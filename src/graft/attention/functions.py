"""The attention function: calls a backend's function with virtual keys and values, or once per segment of a padding-free batch.

It is registered as `graft_<backend>` with transformers' attention interface. With nothing to add it calls the backend's function with the
very arguments it was given, so without an adapter the output is the base's, bit for bit.

Legend: B rows, H query heads, K key-value heads, L queries, S keys, T tokens of a padding-free batch, P virtual tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.transformers_internals import model_file_function
from graft.attention.alibi import Alibi
from graft.attention.parts import attend_in_parts
from graft.attention.relative import with_columns
from graft.attention.varlen import by_varlen, serves
from graft.attention.virtual import VirtualTokens, virtual_tokens
from graft.errors import GraftError
from graft.injection.config_view import PREFIX, view_of
from graft.injection.state import State
from graft.routing.context import ForwardContext

Attend = Callable[..., tuple[Tensor, Tensor | None]]
BACKENDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
NO_CONTEXT = ForwardContext()


def register() -> None:
    """Register the functions with transformers. Repeating it is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for backend in BACKENDS:
        AttentionInterface.register(PREFIX + backend, _function(backend))
        if backend in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(PREFIX + backend, ALL_MASK_ATTENTION_FUNCTIONS[backend])


def attention_view(config: Any) -> Any:
    """Return a view of a config under which attention modules call the functions.

    Unpickling calls this too, perhaps in a process that has not registered the functions yet.
    """
    register()
    return view_of(config, attention_view)


def _function(backend: str) -> Attend:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        return attend(module, backend, query, key, value, attention_mask, **kwargs)

    return attention


def backend_function(module: nn.Module, backend: str) -> Attend:
    """Return the backend's function. For eager attention that is the model file's own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[backend]
    return model_file_function(module, "eager_attention_forward") or plain_attention


def current_context(module: nn.Module) -> ForwardContext:
    """Return the current forward context of an attention module.

    A compiled graph cannot depend on it and gets an empty one. Raises if the graph runs on a padding-free batch.
    """
    state: State = module.__dict__["graft_state"]
    if not torch.compiler.is_compiling():
        return state.current
    state.refuse_flat_in_graph()
    return NO_CONTEXT


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
    """Run attention with what the current forward context adds.

    query: [B, H, L, D]. key, value: [B, K, S, D]. mask: None, boolean or additive [B or 1, H or 1, L, S]. alibi: for models with ALiBi; a
    padded batch has its bias in the mask already, a padding-free one has not. own: the model's own computation, for models that no backend
    equals bit for bit; it is used if nothing is added to keys and values.
    Returns the output [B, L, H, D], and the weights if the backend returns them.
    """
    state: State = module.__dict__["graft_state"]
    context = current_context(module)
    if context.parts is not None:
        return attend_in_parts(attend, module, backend, query, key, value, mask, alibi=alibi, **kwargs)
    _cache_kv(module, state, context, key, value)
    output, weights = _with_virtual_tokens(module, backend, query, key, value, mask, alibi, own, kwargs)
    container: Any = module._modules.get("graft")
    if container is not None and container.hooks.second_attention:
        scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        output = container.add_second_attention(query.transpose(1, 2), scaling, output)
    return output, weights


def _cache_kv(module: nn.Module, state: State, context: ForwardContext, key: Tensor, value: Tensor) -> None:
    """Keep keys and values [1, K, P, D] as [P, K, D] while a prompt, or a text that a prefix starts from, runs through the model alone."""
    compiling = torch.compiler.is_compiling()
    name, cache = (state.cache_in_graph or ("", None)) if compiling else (context.rows, context.cache_to_fill)
    if cache is None:
        return
    if name is None:  # a text runs through the bare base
        cache[module] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        return
    container: Any = module._modules["graft"]
    for adapter in container.hooks.keys_values.get(name, ()):
        if adapter.cached_kv and adapter not in cache:  # gradient checkpointing runs a block a second time
            cache[adapter] = key[0].transpose(0, 1), value[0].transpose(0, 1)


def _with_virtual_tokens(
    module: nn.Module, backend: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, alibi: Alibi | None,
    own: Callable[[], tuple[Tensor, Tensor | None]] | None, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run attention with virtual tokens before the keys, if the rows have any. The arguments are those of `attend`."""
    state: State = module.__dict__["graft_state"]
    function, context = backend_function(module, backend), current_context(module)
    virtual = virtual_tokens(module, state, context, query)
    if context.flat:
        return _by_segments(module, backend, function, query, key, value, context, virtual, alibi, kwargs), None
    if virtual is None:
        return function(module, query, key, value, mask, **kwargs) if own is None else own()
    # From here on [virtual tokens; keys] take the place of the keys. The mask, and T5's bias, get a column for each virtual token.
    if backend == "flex_attention":
        raise GraftError(
            "virtual tokens cannot run with flex_attention: load the base with attention sdpa, eager or flash_attention_2"
        )
    rows = virtual.of_rows(query.shape[0], key.shape[1])
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = with_columns(module, bias, rows, query, key)
    if backend.startswith("flash"):
        if kwargs.get("cu_seq_lens_k") is not None:
            raise GraftError(
                "virtual tokens in rows that a trainer packed need attention sdpa or eager: flash attention would give them to the first "
                "sequence only"
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
    key, value = torch.cat([rows.keys.to(key), key], 2), torch.cat([_as_wide(rows.values, value), value], 2)
    output, weights = function(module, query, key, value, mask, **kwargs)
    return output, None if weights is None else weights[..., rows.count :]


def _as_wide(values: Tensor, like: Tensor) -> Tensor:
    """Return values in the dtype and width of others, which latent attention pads to the width of keys for flash attention."""
    return nn.functional.pad(values.to(like), (0, like.shape[-1] - values.shape[-1]))


def _explicit(module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return the mask, cut to the keys. None stands for a causal mask, or for no mask if there is one query or the model is an encoder."""
    if mask is not None:
        return mask[..., : key.shape[2]]
    length, keys = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    allowed = torch.ones(length, keys, dtype=torch.bool, device=query.device)
    return (allowed.tril() if causal and length > 1 else allowed)[None, None]


def _with_prefix(mask: Tensor, rows: VirtualTokens, seen: Tensor, dtype: torch.dtype, alibi: Alibi | None) -> Tensor:
    """Put columns for the virtual tokens before a mask. seen: [B, L or 1, P].

    The columns' bias is 0, or with ALiBi that of positions before the sequence. E.g. 2 virtual tokens and a causal mask of 3 tokens:

        1 1 | 1 0 0
        1 1 | 1 1 0
        1 1 | 1 1 1
    """
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


def _flash_mask(mask: Tensor | None, rows: VirtualTokens, key: Tensor) -> Tensor:
    """Put columns for the virtual tokens before flash attention's mask, which is [B, S] and true at real tokens."""
    real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device) if mask is None else mask.bool()
    return torch.cat([rows.visible, real], 1)


def _by_segments(
    module: nn.Module, backend: str, function: Attend, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext,
    virtual: VirtualTokens | None, alibi: Alibi | None, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Run attention inside each segment of a padding-free batch. Returns the output [1, T, H, D].

    E.g. context.lengths (3, 2) says that the batch [1, H, 5, D] has two rows end to end: tokens 0, 1 and 2 see only one another, and so do
    tokens 3 and 4. Each segment is a call of the backend's function, with the virtual tokens of its row before its keys. `split`, unlike
    slices, has a backward pass that is a single concatenation.
    """
    assert context.lengths is not None
    if not getattr(module, "is_causal", True):
        raise GraftError(f"{type(module).__name__} is not causal: padding-free batches are for causal models")
    if kwargs.get("position_bias") is not None:
        raise GraftError(
            f"{type(module).__name__} adds a bias by relative position, which padding-free batches do not support"
        )
    # These describe the whole batch, not a segment.
    kwargs = {
        name: item
        for name, item in kwargs.items()
        if not name.startswith(("cu_seq_lens", "max_length", "position_ids"))
    }
    window, outputs = kwargs.get("sliding_window"), []
    chunk = _chunk_of(module) or max(context.lengths)
    pieces = [(row, min(chunk, n - at)) for row, n in enumerate(context.lengths) for at in range(0, n, chunk)]
    lengths = [length for _, length in pieces]
    if virtual is None and alibi is None and backend == "sdpa" and serves(query, kwargs):
        return by_varlen(query, key, value, lengths, kwargs.get("scaling"), window)
    rows = None if virtual is None else virtual.of_rows(len(context.lengths), key.shape[1])
    for (row, _), q, k, v in zip(pieces, *(part.split(lengths, 2) for part in (query, key, value)), strict=True):
        length = q.shape[2]
        one = None if rows is None else rows.row(row)
        # A plain segment: the backend knows that no mask means causal.
        if one is None and alibi is None and backend != "eager" and not (window and window < length):
            outputs.append(function(module, q, k, v, None, **kwargs)[0])
            continue
        # All else is said by an explicit mask: causal, with window, ALiBi and the columns of virtual tokens.
        allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if window and window < length:
            allowed = allowed.triu(1 - window)
        mask = q.new_zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(q.dtype).min)
        if alibi is not None:
            mask = mask + alibi.bias(torch.arange(length, device=q.device), q.dtype)
        if one is not None:
            places = torch.arange(length, device=q.device)[None]
            mask = _with_prefix(mask, one, one.seen(places - one.offsets.amin(), window), q.dtype, alibi)
            k, v = torch.cat([one.keys.to(k), k], 2), torch.cat([_as_wide(one.values, v), v], 2)
        if backend.startswith("flash"):
            raise GraftError(
                "virtual tokens, ALiBi and sliding windows in padding-free batches need attention sdpa or eager"
            )
        outputs.append(function(module, q, k, v, mask, **{**kwargs, "is_causal": False})[0])
    return torch.cat(outputs, 1)


def _chunk_of(module: Any) -> int | None:
    """Return how many tokens a chunk of a layer with chunked attention has: tokens see only those of their chunk. None elsewhere."""
    config, layer = module.config if hasattr(module, "config") else None, getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    chunked = types is not None and isinstance(layer, int) and types[layer] == "chunked_attention"
    return getattr(config, "attention_chunk_size", None) if chunked else None


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute softmax(q k^T * scaling + mask) v with the softmax in float32, for models without an eager function of their own."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def needed(module: Any) -> bool:
    """Whether this attention has to call the attention function: the batch is padding-free, or an adapter in use acts here."""
    container, context = module._modules.get("graft"), current_context(module)
    table = {} if container is None else {**container.hooks.keys_values, **container.hooks.second_attention}
    if torch.compiler.is_compiling():
        return len(table) > 0  # torch 2.10 does not trace bool() of a dictionary
    unmerged = module.__dict__["graft_state"].merged is None
    return (
        context.flat or context.cache_to_fill is not None or unmerged and any(name in context.names for name in table)
    )
