"""Load a base in 4 or 8 bits: what transformers is told, which layers stay as they are, and what is set right afterwards.

transformers replaces the linear layers of the empty model by those of bitsandbytes, and quantises each weight when it is read. It would
also quantise layers that the files lack, such as a fresh head, and it knows no names of sites.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from graft.architectures.four_bit import PACKS, is_four_bit
from graft.architectures.language import resolve_sites
from graft.architectures.layers import is_linear, is_transposed
from graft.architectures.site import SiteType
from graft.architectures.sites import SiteTable
from graft.architectures.torchao import forbid_rounding
from graft.bases.heads import head_modules
from graft.config.base import BaseConfig, FewBits
from graft.errors import GraftError, did_you_mean, require
from graft.utils.bits import bitsandbytes


class _Named:
    """A request to the site language for whatever one name of `base.skip` means."""

    kind = "base.skip"
    takes: ClassVar[frozenset[SiteType]] = frozenset({"linear", "sublayer", "embedding", "norm", "experts", "other"})

    def __init__(self, name: str) -> None:
        self.sites: str | tuple[str, ...] = (name,)


def method_of(found: Any) -> dict[str, Any] | None:
    """Return how the checkpoint of this config is quantised, as its `quantization_config` says; None if it is not."""
    said = getattr(found, "quantization_config", None) or getattr(found.get_text_config(), "quantization_config", None)
    return said if isinstance(said, dict) or said is None else said.to_dict()


def refuse_unknown_method(config: BaseConfig, method: Mapping[str, Any]) -> None:
    """Raise `GraftError` for a checkpoint in few bits of a kind that transformers cannot read: it would take codes for weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = {each.removesuffix("_4bit").removesuffix("_8bit") for each in AUTO_QUANTIZATION_CONFIG_MAPPING}
    own, by_bitsandbytes = method.get("quant_method"), method.get("load_in_4bit") or method.get("load_in_8bit")
    if own is None and not by_bitsandbytes:  # whose old files say no more
        raise GraftError(
            f"base.model: the config.json of '{config.model}' has a quantization_config without a quant_method, so nobody can say how its "
            "weights are stored: remove it if they are not quantised, or name another base"
        )
    if own is not None and own not in known:
        raise GraftError(
            f"base.model: the weights of '{config.model}' are quantised by '{own}', which the installed transformers cannot read; it reads "
            f"{', '.join(sorted(known))}. Name the base that it was quantised from: base.quantize (nf4, fp4, int8) makes that small"
        )


def options_of(config: BaseConfig, found: Any, model: nn.Module, dtype: torch.dtype, labelled: bool) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantise a base while it loads.

    found: the base's config. model: the model of it without weights. labelled: whether the model is a classifier.
    Raises `MissingExtra`, and `GraftError` for a base that is quantised already and a name in `skip` that meets nothing.
    """
    if (own := method_of(found)) is not None:
        raise GraftError(
            f"base.quantize: '{config.model}' comes quantised already ({own.get('quant_method', 'by an unknown method')}): remove "
            f"base.quantize, or name the same base in bfloat16"
        )
    compute, kept = (
        dtype if config.compute is None else getattr(torch, config.compute),
        kept_layers(config.skip, model, labelled),
    )
    assert config.quantize is not None
    if not any(is_linear(module) and path not in kept for path, module in model.named_modules()):
        why = (
            "base.skip names all of its linear layers"
            if config.skip
            else "it has no linear layers but those that are never quantised"
        )
        raise GraftError(
            f"base.quantize: nothing of '{config.model}' would be in {config.quantize}, because {why}: name fewer of them, or remove "
            "base.quantize"
        )
    return {"quantization_config": instructions(config.quantize, config.double_quant is not False, compute, kept)}


def instructions(kind: FewBits, double_quant: bool, compute: torch.dtype, kept: Iterable[str]) -> Any:
    """Return what transformers reads and writes about a quantised model. kept: the paths of linear layers that are not quantised."""
    need_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=sorted(kept))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=sorted(kept),
    )


def need_bitsandbytes() -> None:
    """Raise `MissingExtra` unless bitsandbytes and accelerate, with which transformers loads its layers, are installed."""
    bitsandbytes()
    require("accelerate", "quant")


def kept_layers(skip: Iterable[str] | None, model: Any, labelled: bool) -> set[str]:
    """Return the paths of the linear layers that are not quantised. skip: `base.skip`. labelled: whether the model is a classifier."""
    if skip is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        kept = {path for path, module in model.named_modules() if module is head}
    else:
        kept = {path for name in skip for path in _met(name, model)}
    by_weight: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_weight[id(parameter)].append(name.rpartition(".")[0])
    tied = {path for paths in by_weight.values() if len(paths) > 1 for path in paths}
    wanted = kept | tied | set(head_modules(model) if labelled else ())
    return {path for path, module in model.named_modules() if path in wanted and is_linear(module)}


def _met(name: str, model: Any) -> list[str]:
    """Return the linear layers that a name of `skip` means: a path of a module, with all that is in it, or the name of a site."""
    modules = dict(model.named_modules())
    table = SiteTable(model)
    if name in modules and name:
        roots = [name]
    elif "." in name and name.split(".")[0] in modules and not name.startswith("re:") and name not in table.names():
        raise GraftError(f"base.skip: there is no module '{name}' in this model.{did_you_mean(name, modules)}")
    else:
        try:
            sites = resolve_sites(table, _Named(name))
        except GraftError as error:
            raise GraftError(f"base.skip: {error}") from error
        if any(site.type == "sublayer" for site in sites):
            raise GraftError(
                f"base.skip: '{name}' is a sublayer: name its linear layers (attn.q, mlp.up, ...) or the path of a module "
                f"({next(path for path in modules if path.count('.') > 1)})"
            )
        roots = [site.module for site in sites]
    return [
        path
        for path, module in modules.items()
        if is_linear(module) and any(path == root or path.startswith(f"{root}.") for root in roots)
    ]


def quantise_layer(model: nn.Module, path: str, how: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Put a layer of bitsandbytes on a device in place of a plain linear layer, as transformers does while it loads.

    how: as `instructions` says. dtype: the model's.
    """
    layers: Any = bitsandbytes().nn
    plain: Any = model.get_submodule(path)
    weight = (plain.weight.t().contiguous() if is_transposed(plain) else plain.weight).detach().to(device, dtype)
    sizes, bias = (*reversed(weight.shape), plain.bias is not None), plain.bias
    if how.load_in_8bit:
        made = layers.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        made.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        made = layers.Linear4bit(
            *sizes,
            compute_dtype=how.bnb_4bit_compute_dtype,
            compress_statistics=how.bnb_4bit_use_double_quant,
            quant_type=how.bnb_4bit_quant_type,
            device="meta",
        )
        made.weight = layers.Params4bit(weight, requires_grad=False, **vars(made.weight)).to(device)
    made.bias = None if bias is None else nn.Parameter(bias.detach().to(device, dtype), requires_grad=False)
    replace_layer(model, path, made.eval())
    settle(made, dtype, ())


def settle(model: nn.Module, dtype: torch.dtype, missing: Iterable[str]) -> None:
    """Set right what transformers leaves of a model that it has quantised, or that came quantised.

    torchao's layers compute with their input as it is. Of bitsandbytes, layers that the files lack become plain ones again (missing: their
    paths), 8-bit layers compute densely, 4-bit layers may not be packed, and hold their biases in the dtype in which they compute, as their
    first forward would otherwise do.
    """
    forbid_rounding(model, for_good=True)
    library: Any = sys.modules.get("bitsandbytes")
    if library is None:  # another library's layers
        return
    for path in missing:
        layer: Any = model.get_submodule(path)
        if isinstance(layer, library.nn.Linear4bit | library.nn.Linear8bitLt):
            replace_layer(model, path, _plain(layer, dtype))
    for layer in model.modules():
        if PACKS in layer.__dict__:
            layer.__dict__[PACKS] = False
        if is_four_bit(layer) and layer.bias is not None and layer.compute_dtype is not None:
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)  # pyright: ignore
    from graft.ops.eight_bit import compute_densely

    compute_densely(model, dtype)


def replace_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put another layer in place of the one at a path."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = layer


def _plain(layer: Any, dtype: torch.dtype) -> nn.Module:
    """Return an empty layer of the class that a quantised one stands for, on its device."""
    device, bias = layer.weight.device, layer.bias is not None
    device = torch.device("cpu") if device.type == "meta" else device
    cls: Any = getattr(layer, "source_cls", nn.Linear)
    made: nn.Module = (
        nn.Linear(layer.in_features, layer.out_features, bias=bias)
        if cls is nn.Linear
        else cls(layer.out_features, layer.in_features)
    )
    assert is_linear(made) or is_transposed(made)
    return made.to(device, dtype)
