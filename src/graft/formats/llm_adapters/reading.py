"""Checkpoints of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933): `adapter_config.json` beside a pickle of plain tensors.

The tensor names are the base's module names behind `base_model.model.`. What each file means:

    LORA            lora_A [R, I], lora_B [O, R].  h + alpha / R * B A x.  With `enable_lora` (one target, a fused
                    projection): lora_A [G R, I] and lora_B [G O / n, R, 1] for G enabled of n slices of the output,
                    which here is one LoRA of rank G R with a block-structured B.
    BOTTLENECK      f(u) = s up(act(down(u))).  In parallel: W x + f(x).  In series by the module's name: before the
                    layer that leads into the MLP, after the one that leads out.  s is a number of the config or a
                    tensor of the file.
    PREFIX_TUNING   prompt_embeddings [P, 2 L H D] seen as [P, 2 L, H, D]: keys of layer l in slot 2 l, its values in
                    slot 2 l + 1; the sequence's positions start at P.  BLOOM: keys in the first L slots, values in the
                    last L, and the memory of a key block [P, H, D] is read as [H, D, P].
    PROMPT_TUNING, P_TUNING
                    prompt_embeddings [P, D]: what stands before the embedded sequence; P-tuning's encoder is folded away.

Changed biases and `modules_to_save` are whole tensors in the file; here they are differences to the base.

Legend: R rank, I input, O output features, P virtual tokens, L layers, H heads, D head size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.full import Full
from graft.adapters.kinds.lora import LoRA
from graft.adapters.kinds.parallel import Parallel
from graft.adapters.kinds.prefix import Prefix
from graft.adapters.kinds.prompt import PromptTuning
from graft.adapters.kinds.series import Series
from graft.adapters.kinds.stack import Stack
from graft.architectures.language import resolve_sites
from graft.architectures.layers import is_linear, widths
from graft.architectures.sites import SiteTable
from graft.errors import GraftError
from graft.formats.foreign import CONFIG, Checkpoint, read_config
from graft.injection.state import site_table_of

ROOT = "base_model.model."
LATER_KEYS = {"auto_mapping", "revision", "peft_version"}
"""Keys that PEFT's configs have and those of this fork, made from an older PEFT, do not."""
SERIES_POSITIONS = {
    "gate_proj": "before", "up_proj": "before", "dense_h_to_4h": "before", "fc_in": "before", "c_fc": "before", "fc1": "before",
    "down_proj": "after", "dense_4h_to_h": "after", "fc_out": "after", "c_proj": "after", "fc2": "after",
}  # fmt: skip

Part = tuple[AdapterConfig, dict[str, Tensor]]
"""One module's adapter: its config without sites, and its tensors by their own names."""


def detect(folder: str | Path) -> bool:
    """Whether the folder's config is one that LLM-Adapters writes."""
    if not (Path(folder) / CONFIG).is_file():
        return False
    config = read_config(Path(folder))
    return config.get("peft_type") in READERS and not LATER_KEYS & set(config)


def read(folder: str | Path, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter of a folder for this base: a config, and float32 tensors under `<module>.<site part>.<parameter>`.

    Raises `GraftError` for an unknown kind, a damaged file, and missing or unexpected tensors (all are listed).
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind not in READERS:
        raise GraftError(f"{folder}: unknown peft_type {kind!r}; LLM-Adapters has {', '.join(READERS)}")
    file = Checkpoint(folder, config, ROOT)
    found = READERS[kind](file, model)
    file.finish()
    return found


def _read_lora(file: Checkpoint, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    rank, alpha = file.field("r"), file.field("lora_alpha")
    enabled = file.config.get("enable_lora") or [True]
    groups = sum(enabled)

    def part(path: str, module: Any) -> Part:
        tensors = {"A": file.take(f"{path}.lora_A.weight"), "B": file.take(f"{path}.lora_B.weight")}
        if tensors["B"].dim() == 3:
            tensors["B"] = _block_structured(tensors["B"], enabled, widths(module, path)[1])
        tensors |= _bias(file, path, module)
        # The scale stays alpha / rank of one group.
        like = LoRA(
            rank=rank * groups,
            alpha=alpha * groups,
            dropout=file.config.get("lora_dropout") or 0.0,
            train_bias="bias" in tensors,
        )
        return like, tensors

    return _composed(file, model, {path: part(path, module) for path, module in _targets(file, model)})


def _block_structured(grouped: Tensor, enabled: list[bool], out_features: int) -> Tensor:
    """B [O, G R] from [G O / n, R, 1]: group g sees its own R columns and writes the g-th enabled slice of the output."""
    rank, groups, size = grouped.shape[1], sum(enabled), out_features // len(enabled)
    if tuple(grouped.shape) != (groups * size, rank, 1):
        slices = f"{groups} of {len(enabled)} slices of {out_features} features"
        raise GraftError(f"lora_B of shape {tuple(grouped.shape)} does not fit {slices}")
    whole = torch.zeros(len(enabled), size, groups, rank)
    chosen = [index for index, on in enumerate(enabled) if on]
    whole[chosen, :, range(groups)] = grouped.view(groups, size, rank)
    return whole.view(out_features, groups * rank)


def _read_bottleneck(file: Checkpoint, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    scale = file.config.get("scaling", 1.0)
    fields: dict[str, Any] = {
        "bottleneck": file.field("bottleneck_size"),
        "activation": file.field("non_linearity"),
        "scale": "learned" if scale == "learned" else float(scale),
        "dropout": file.config.get("adapter_dropout") or 0.0,
        "biases": False,
        "init": "mam" if file.config.get("init_weights") == "mam_adapter" else "bert",
    }

    def part(path: str, module: nn.Module) -> Part:
        tensors = {f"f.{side}.weight": file.take(f"{path}.adapter_{side}.weight") for side in ("down", "up")}
        if scale == "learned":
            tensors["f.scale"] = file.take(f"{path}.adapter_scaling")
        tensors |= _bias(file, path, module)
        own = {**fields, "train_bias": "bias" in tensors}
        beside = file.config.get("use_parallel_adapter")
        return (Parallel(**own) if beside else Series(position=_position(path), **own)), tensors

    return _composed(file, model, {path: part(path, module) for path, module in _targets(file, model)})


def _position(path: str) -> Any:
    name = path.rsplit(".", 1)[-1]
    if name not in SERIES_POSITIONS:
        raise GraftError(f"LLM-Adapters defines no series adapter at '{path}'; only at {', '.join(SERIES_POSITIONS)}")
    return SERIES_POSITIONS[name]


def _read_prefix(file: Checkpoint, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    flat = file.take("prompt_embeddings")
    prefix = Prefix(tokens=file.field("num_virtual_tokens"), init_std=1.0, positions="after_prefix")
    sites = resolve_sites(site_table_of(model), prefix)
    heads, head_dim, layers = sites[0].num_kv_heads, sites[0].head_dim, len(sites)
    wanted = (prefix.tokens, 2 * layers * heads * head_dim)
    if flat.numel() and tuple(flat.shape) != wanted:
        raise GraftError(
            f"{file.folder}: prompt_embeddings has shape {tuple(flat.shape)}, but {prefix.tokens} virtual tokens for "
            f"{layers} layers of {heads} key-value heads of size {head_dim} need {wanted}"
        )
    if not flat.numel():
        return prefix, {}
    slots = flat.view(prefix.tokens, 2 * layers, heads, head_dim).transpose(0, 1)  # [2 L, P, H, D]
    keys, values = slots[0::2], slots[1::2]
    if getattr(site_table_of(model).text_config, "model_type", None) == "bloom":
        keys, values = slots[:layers], slots[layers:]
        keys = keys.reshape(layers, heads, head_dim, prefix.tokens).permute(0, 3, 1, 2)
    return prefix, {
        f"{site.module}.{site.part}.{name}": part[layer].contiguous()
        for layer, site in enumerate(sites)
        for name, part in (("keys", keys), ("values", values))
    }


def _read_prompt(file: Checkpoint, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    vectors = file.take("prompt_embeddings")
    prompt = PromptTuning(tokens=file.field("num_virtual_tokens"))
    (site,) = resolve_sites(site_table_of(model), prompt)
    wanted = (prompt.tokens, site.out_features)
    if vectors.numel() and tuple(vectors.shape) != wanted:
        raise GraftError(
            f"{file.folder}: prompt_embeddings has shape {tuple(vectors.shape)}, but {prompt.tokens} virtual tokens before this base's "
            f"embedding need {wanted}"
        )
    return prompt, {f"{site.module}.{site.part}.vectors": vectors} if vectors.numel() else {}


def _targets(file: Checkpoint, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers that `target_modules` names: a regular expression for the whole name, or a list of endings."""
    wanted = file.config.get("target_modules")
    if wanted is None:  # the fork's defaults by family: exactly the modules that the file has tensors for
        wanted = sorted({name.rsplit(".", 2)[0] for name in file.left if ".lora_" in name or ".adapter_" in name})
    found = False
    for path, module in model.named_modules():
        matches = re.fullmatch(wanted, path) if isinstance(wanted, str) else path.endswith(tuple(wanted))
        if matches and is_linear(module) and "graft" not in path.split("."):
            found = True
            yield path, module
    if not found:
        raise GraftError(f"{file.folder}: target_modules {wanted!r} names no linear layer of this base")


def _bias(file: Checkpoint, path: str, module: Any) -> dict[str, Tensor]:
    """The difference to the layer's bias, where the file holds changed biases."""
    if file.config.get("bias", "none") == "none" or module.bias is None:
        return {}
    return {"bias": _difference(file.take(f"{path}.bias"), module.bias)}


def _composed(file: Checkpoint, model: nn.Module, parts: Mapping[str, Part]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """One config for all adapted modules: a stack where they differ in more than their place."""
    parts = {**parts, **_saved_modules(file, model)}
    groups: dict[str, tuple[AdapterConfig, list[str]]] = {}
    for path, (part, _) in parts.items():
        groups.setdefault(f"{part.kind} {part.model_dump_json()}", (part, []))[1].append(path)
    site_table = site_table_of(model)
    configs = [part.model_copy(update={"sites": _site_names(site_table, paths)}) for part, paths in groups.values()]
    tensors = {f"{path}.linear.{name}": tensor for path, (_, own) in parts.items() for name, tensor in own.items()}
    return configs[0] if len(configs) == 1 else Stack(adapters=tuple(configs)), tensors


def _saved_modules(file: Checkpoint, model: nn.Module) -> dict[str, Part]:
    """Modules that the file holds whole (`modules_to_save`, by the end of their names), as differences to the base."""
    found: dict[str, Part] = {}
    wanted = tuple(file.config.get("modules_to_save") or ())
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for path, module in list(model.named_modules()) if wanted else ():
        if not path.endswith(wanted) or not isinstance(module, nn.Linear) or "graft" in path.split("."):
            continue
        if embedding is not None and embedding.weight is module.weight:
            raise GraftError(
                f"{file.folder} replaces '{path}', whose weight this base shares with its input embedding: one would "
                "change the other, so the adapter needs a base with tie_word_embeddings: false"
            )
        weight = file.take(f"{path}.weight")
        tensors = {"weight": _difference(weight, module.weight)}
        if module.bias is not None:
            tensors["bias"] = _difference(file.take(f"{path}.bias"), module.bias)
        found[path] = (Full(train_bias="bias" in tensors), tensors)
    return found


def _difference(whole: Tensor, base: Any) -> Tensor:
    """Whole tensor minus the base's own, in float32; a missing one stays empty."""
    return whole - base.detach().float().cpu() if whole.shape == base.shape else whole


def _site_names(site_table: SiteTable, paths: Iterable[str]) -> str | tuple[str, ...]:
    """The shortest way to say these modules in the site language; a regular expression for each that has no name."""
    left = set(paths)
    by_name: dict[str, dict[str, int]] = {}
    for block in site_table.blocks:
        for site in site_table.of_block(block):
            if site.type == "linear" and site.rows is None and site.layer is not None:
                by_name.setdefault(site.name, {})[site.module] = site.layer
    names = []
    for name, modules in by_name.items():
        chosen = sorted(layer for path, layer in modules.items() if path in left)
        if chosen:
            names.append(name if len(chosen) == len(modules) else f"{name}@{','.join(map(str, chosen))}")
            left -= set(modules)
    head = site_table.end("head")
    if head is not None and head.module in left:
        names.append("head")
        left.remove(head.module)
    names += [f"re:{re.escape(path)}" for path in sorted(left)]
    return tuple(names) if any(name.startswith("re:") for name in names) else " ".join(names)


READERS = {
    "LORA": _read_lora, "BOTTLENECK": _read_bottleneck, "PREFIX_TUNING": _read_prefix,
    "PROMPT_TUNING": _read_prompt, "P_TUNING": _read_prompt,
}  # fmt: skip
