"""Find the family of one block by its structure, for model types that are not in the table.

Linear layers are known by their usual names. The norm of a sublayer is found in the source of the block's forward, by the order in which
it calls norms and sublayers and adds to the residual, innermost call first. With N norm, A attention, M MLP, + addition:

    N A + N M +        before the sublayer (LLaMA)            N A M +            one norm for both (Cohere)
    N A N + N M N +    h is the second norm's output (Gemma)  A N + M N +        the same without the first (OLMo 2)
    A + N M + N        after the addition (BART)
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from torch import nn

from graft.architectures.family import Family, Sublayer
from graft.architectures.layers import is_linear, is_norm
from graft.architectures.source import ADD, Step, forward_steps

_ATTENTION = ("attn", "attention", "self_attn", "self_attention", "attn_layer")
_CROSS = ("encoder_attn", "crossattention", "cross_attn", "cross_attention", "encoder_attention")
_MLP = ("mlp", "feed_forward", "feedforward", "ffn", "ff", "moe", "block_sparse_moe")
_NAMES: dict[str, tuple[str, ...]] = {
    "attn.q": ("q_proj", "query", "q", "wq", "Wq", "q_lin", "query_proj", "c_q", "project_q"),
    "attn.k": ("k_proj", "key", "k", "wk", "Wk", "k_lin", "key_proj", "c_k", "project_k"),
    "attn.v": ("v_proj", "value", "v", "wv", "Wv", "v_lin", "value_proj", "c_v", "project_v"),
    "attn.qkv": ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj"),
    "attn.o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo", "o", "out_lin", "proj", "attention_out"),
    "mlp.gate": ("gate_proj", "wi_0", "w1", "w_0"),
    "mlp.up": ("up_proj", "wi_1", "w3", "w_1", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "wi", "lin1", "linear1", "intermediate.dense",
               "intermediate"),
    "mlp.gate_up": ("gate_up_proj", "Wi"),
    "mlp.down": ("down_proj", "w2", "w_out", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "wo", "Wo", "lin2", "linear2", "output.dense",
                 "output"),
}  # fmt: skip


def resolve_structure(block: nn.Module) -> Family:
    """Return the family of a block. A sublayer with modules that are not found is left out.

    An MLP with experts is one module from x to h. `mlp.up` and the others are then the layers of the expert that all tokens use.
    """
    children = {name: child for name, child in block.named_children() if not isinstance(child, nn.ModuleList)}
    cross = next((name for name in _CROSS if name in children), "")
    attention = next((name for name, child in children.items() if name != cross and _is_attention(name, child)), "")
    linears = _linears(block, attention, cross)
    sublayers: dict[str, Sublayer] = {}
    for name, child in (("attn", attention), ("cross", cross)):
        if child:
            first = next((linears[site] for site in (f"{name}.q", f"{name}.qkv", f"{name}.k") if site in linears), "")
            out = linears.get(f"{name}.o", "")
            sublayers[name] = Sublayer(_parent(first) or child, out or child)
    mlp = _mlp(block, linears, children)
    if mlp is not None:
        sublayers["mlp"] = mlp
    # The steps that matter for norms: those of sublayers, norms and additions.
    tops = {path.partition(".")[0] for sublayer in sublayers.values() for path in (sublayer.source, sublayer.out)}
    steps = tuple(step for step in forward_steps(block) if step.name in _norms(block) | tops | {ADD})
    return Family(linears, {name: _with_norm(block, sublayer, steps) for name, sublayer in sublayers.items()})


def _linears(block: nn.Module, attention: str, cross: str) -> dict[str, str]:
    """Return the linear layers of a block by site name. Those in lists of modules (experts) have no names."""
    linears: dict[str, str] = {}
    lists = tuple(f"{path}." for path, module in block.named_modules() if isinstance(module, nn.ModuleList))
    for path, module in block.named_modules():
        if not is_linear(module) or {"graft", "router", "gate"} & set(path.split(".")) or path.startswith(lists):
            continue
        top = path.partition(".")[0]
        room = "attn" if top == attention else "cross" if top == cross else "mlp"
        if room != "mlp" and not _computes_attention(block, _parent(path), top):
            continue
        # E.g. "self_attn.q_proj" ends with ".q_proj", so it is attn.q; in a cross-attention the same ending is cross.q.
        for site, names in _NAMES.items():
            place, _, part = site.partition(".")
            ending = f".{path.removesuffix('.linear')}"
            if (place == "mlp") == (room == "mlp") and ending.endswith(tuple(f".{name}" for name in names)):
                linears.setdefault(f"{room}.{part}", path)
                break
    if "mlp.gate" in linears and "mlp.up" not in linears:
        linears["mlp.up"] = linears.pop("mlp.gate")
    return linears


def _computes_attention(block: nn.Module, parent: str, top: str) -> bool:
    """Whether a layer in an attention module is one of its projections, and not that of a helper (the indexer of sparse attention)."""
    inner = parent.removeprefix(top).strip(".")
    name = type(block.get_submodule(parent)).__name__
    return "." not in inner and (not inner or "Attention" in name or "Output" in name or "Linear" in name)


def _is_attention(name: str, child: nn.Module) -> bool:
    named = name in _ATTENTION or "Attention" in type(child).__name__
    return named and any(is_linear(module) for module in child.modules())


def _mlp(block: nn.Module, linears: dict[str, str], children: dict[str, nn.Module]) -> Sublayer | None:
    up = linears.get("mlp.gate") or linears.get("mlp.up") or linears.get("mlp.gate_up")
    down = linears.get("mlp.down")
    if up is None or down is None:
        name = next((name for name in _MLP if name in children), None)
        if name is None or not isinstance(children[name], nn.Sequential):
            return None if name is None else Sublayer(name, name)
        inside = [f"{name}.{path}" for path, module in children[name].named_modules() if is_linear(module)]
        return Sublayer(inside[0], inside[-1]) if inside else None
    shared = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(_parent(up).split("."), _parent(down).split("."), strict=False)
    )
    common = ".".join(one for one, _ in shared)
    top = common.partition(".")[0]
    if not common:
        return Sublayer(_parent(up) or up, down)
    experts = any(
        isinstance(module, nn.ModuleList) or name == "experts" for name, module in children[top].named_modules()
    )
    return Sublayer(top, top) if experts else Sublayer(common, down)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _norms(block: nn.Module) -> set[str]:
    """Return the names of the children that normalise, with weights or without."""
    return {name for name, child in block.named_children() if "norm" in f"{name} {type(child).__name__}".lower()}


def _with_norm(block: nn.Module, sublayer: Sublayer, steps: tuple[Step, ...]) -> Sublayer:
    """Return the sublayer with its norm and the module that reads the residual stream, as far as the steps show them."""
    beside = sublayer.out.rpartition(".")[0]
    if beside and not f"{sublayer.source}.".startswith(f"{beside}."):
        for name, module in block.get_submodule(beside).named_children():
            if is_norm(module):  # BERT's output modules: dense, addition, norm
                return replace(sublayer, norm=f"{beside}.{name}", residual=sublayer.source, post=True)
    own = {sublayer.source.partition(".")[0], sublayer.out.partition(".")[0]}
    at = next((number for number, step in enumerate(steps) if step.name in own), None)
    if at is None:
        return sublayer
    norms = _norms(block)
    after = [step for step in steps[at:] if step.name not in own]
    if after and after[0].name in norms and after[0].reads & steps[at].writes:
        sublayer = replace(sublayer, out=after[0].name)  # no addition in between: h is that norm's output
    calls = [step.name for step in after if step.name != ADD]
    if (
        next(step.name for step in steps if step.name != ADD) in norms
    ):  # a block that begins with a norm has norms before sublayers
        for step in reversed(steps[:at]):
            if step.name == ADD:
                break
            if step.name in norms:
                return replace(sublayer, norm=step.name, residual=step.name)
    elif sublayer.out in norms:
        return replace(sublayer, norm=sublayer.out, residual=sublayer.source)
    elif calls and calls[0] in norms:
        return replace(sublayer, norm=calls[0], residual=sublayer.source, post=True)
    return sublayer
