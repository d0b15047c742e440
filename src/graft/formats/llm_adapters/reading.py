"""Read folders of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933): `adapter_config.json` beside a pickle of plain tensors.

Tensor names are the base's module names after `base_model.model.`. Each kind stores:

    LORA            lora_A [R, I], lora_B [O, R].  h + alpha / R * B A x.  With `enable_lora` (one target, a fused
                    projection): lora_A [G R, I] and lora_B [G O / n, R, 1] for G enabled of n slices of the output,
                    which Graft reads as one LoRA of rank G R with a block-structured B.
    BOTTLENECK      f(u) = s up(act(down(u))).  In parallel: W x + f(x).  In series, the module's name decides: before
                    the layer that leads into the MLP, after the one that leads out.  s is a number in the config or a
                    tensor in the file.
    PREFIX_TUNING   prompt_embeddings [P, 2 L H D] viewed as [P, 2 L, H, D]: the keys of layer l in slot 2 l, its values
                    in slot 2 l + 1; the sequence's positions start at P.  BLOOM: keys in the first L slots, values in
                    the last L, and the memory of a key block [P, H, D] is read as [H, D, P].
    PROMPT_TUNING, P_TUNING
                    prompt_embeddings [P, D]: the vectors before the embedded sequence; P-tuning's encoder is folded away.

The file holds changed biases and `modules_to_save` whole; Graft holds them as differences to the base.

Legend: R rank, I input, O output features, P virtual tokens, L layers, H heads, D head size (of a prompt: hidden size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from graft.architectures.layers import is_linear, widths
from graft.architectures.walk import base_submodules
from graft.errors import GraftError
from graft.formats.composing import Piece, composed, difference
from graft.formats.fields import known
from graft.formats.foreign import CONFIG, AdapterFile, read_config
from graft.formats.llm_adapters.fields import FIELDS, written_by_llm_adapters
from graft.formats.peft.naming import ROOT
from graft.injection.state import site_table_of, sites_of
from graft.utils.patterns import pattern

SERIES_POSITIONS = {
    "gate_proj": "before", "up_proj": "before", "dense_h_to_4h": "before", "fc_in": "before", "c_fc": "before", "fc1": "before",
    "down_proj": "after", "dense_4h_to_h": "after", "fc_out": "after", "c_proj": "after", "fc2": "after",
}  # fmt: skip
"""The position of a series adapter, by the last part of the layer's name."""


def detect(folder: str | Path) -> bool:
    """Whether LLM-Adapters wrote the folder's config."""
    if not (Path(folder) / CONFIG).is_file():
        return False
    return written_by_llm_adapters(read_config(Path(folder)))


def read(folder: str | Path, model: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read a folder's adapter for this base: its config, and float32 tensors under Graft's names.

    Raises `GraftError` for an unknown kind, a damaged file, and missing or unexpected tensors (all are listed).
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind not in READERS:
        raise GraftError(f"{folder}: unknown peft_type {kind!r}; LLM-Adapters has {', '.join(READERS)}")
    config = known(FIELDS[kind], config, str(folder / CONFIG), f"LLM-Adapters' {kind}")
    file = AdapterFile(folder, config, ROOT)
    pieces = READERS[kind](file, model)
    file.finish()
    return composed(model, pieces)


def _read_lora(file: AdapterFile, model: nn.Module) -> list[Piece]:
    rank, alpha = file.field("r"), file.field("lora_alpha")
    enabled = file.config.get("enable_lora") or [True]
    groups = sum(enabled)
    pieces = []
    for path, module in _targets(file, model):
        tensors = {"A": file.take(f"{path}.lora_A.weight"), "B": file.take(f"{path}.lora_B.weight")}
        if tensors["B"].dim() == 3:
            tensors["B"] = _block_structured(tensors["B"], enabled, widths(module, path)[1])
        tensors |= _bias(file, path, module)
        config = LoRA(
            rank=rank * groups,
            alpha=alpha * groups,  # keeps the scale at alpha / rank of one group
            dropout=file.config.get("lora_dropout") or 0.0,
            train_bias="bias" in tensors,
        )
        pieces.append(Piece(path, config, tensors))
    return _with_saved_modules(file, model, pieces)


def _block_structured(grouped: Tensor, enabled: list[bool], out_features: int) -> Tensor:
    """Turn a grouped B [G O / n, R, 1] into B [O, G R]: group g has its own R columns and writes to the g-th enabled slice.

    E.g. with q and v of three slices of 8 features enabled and rank 2, grouped is [16, 2, 1]. B is [24, 4]: its first 8 output features (q)
    use columns 0 and 1, the next 8 (k) are zero, and the last 8 (v) use columns 2 and 3.
    """
    rank, groups, size = grouped.shape[1], sum(enabled), out_features // len(enabled)
    if tuple(grouped.shape) != (groups * size, rank, 1):
        slices = f"{groups} of {len(enabled)} slices of {out_features} features"
        raise GraftError(f"lora_B of shape {tuple(grouped.shape)} does not fit {slices}")
    whole = torch.zeros(len(enabled), size, groups, rank)
    chosen = [index for index, on in enumerate(enabled) if on]
    whole[chosen, :, range(groups)] = grouped.view(groups, size, rank)
    return whole.view(out_features, groups * rank)


def _read_bottleneck(file: AdapterFile, model: nn.Module) -> list[Piece]:
    scale = file.config.get("scaling", 1.0)
    fields: dict[str, Any] = {
        "bottleneck": file.field("bottleneck_size"),
        "activation": file.field("non_linearity"),
        "scale": "learned" if scale == "learned" else float(scale),
        "dropout": file.config.get("adapter_dropout") or 0.0,
        "biases": False,
        "init": "mam" if file.config.get("init_weights") == "mam_adapter" else "bert",
    }
    pieces = []
    for path, module in _targets(file, model):
        tensors = {f"f.{side}.weight": file.take(f"{path}.adapter_{side}.weight") for side in ("down", "up")}
        if scale == "learned":
            tensors["f.scale"] = file.take(f"{path}.adapter_scaling")
        tensors |= _bias(file, path, module)
        own = {**fields, "train_bias": "bias" in tensors}
        parallel = file.config.get("use_parallel_adapter")
        pieces.append(Piece(path, Parallel(**own) if parallel else Series(position=_position(path), **own), tensors))
    return _with_saved_modules(file, model, pieces)


def _position(path: str) -> Any:
    name = path.rsplit(".", 1)[-1]
    if name not in SERIES_POSITIONS:
        raise GraftError(f"LLM-Adapters defines no series adapter at '{path}'; only at {', '.join(SERIES_POSITIONS)}")
    return SERIES_POSITIONS[name]


def _read_prefix(file: AdapterFile, model: nn.Module) -> list[Piece]:
    flat = file.take("prompt_embeddings")
    prefix = Prefix(tokens=file.field("num_virtual_tokens"), init_std=1.0, positions="after_prefix")
    sites = sites_of(model, prefix)
    heads, head_dim, layers = sites[0].num_kv_heads, sites[0].head_dim, len(sites)
    wanted = (prefix.tokens, 2 * layers * heads * head_dim)
    if not flat.numel():
        return []
    if tuple(flat.shape) != wanted:
        raise GraftError(
            f"{file.folder}: prompt_embeddings has shape {tuple(flat.shape)}, but {prefix.tokens} virtual tokens for "
            f"{layers} layers of {heads} key-value heads of size {head_dim} need {wanted}"
        )
    slots = flat.view(prefix.tokens, 2 * layers, heads, head_dim).transpose(0, 1)  # [2 L, P, H, D]
    keys, values = slots[0::2], slots[1::2]
    if getattr(site_table_of(model).text_config, "model_type", None) == "bloom":
        keys, values = slots[:layers], slots[layers:]
        keys = keys.reshape(layers, heads, head_dim, prefix.tokens).permute(0, 3, 1, 2)
    return [
        Piece(site.module, prefix, {"keys": keys[n].contiguous(), "values": values[n].contiguous()}, site.part)
        for n, site in enumerate(sites)
    ]


def _read_prompt(file: AdapterFile, model: nn.Module) -> list[Piece]:
    vectors = file.take("prompt_embeddings")
    prompt = PromptTuning(tokens=file.field("num_virtual_tokens"))
    (site,) = sites_of(model, prompt)
    wanted = (prompt.tokens, site.out_features)
    if not vectors.numel():
        return []
    if tuple(vectors.shape) != wanted:
        raise GraftError(
            f"{file.folder}: prompt_embeddings has shape {tuple(vectors.shape)}, but {prompt.tokens} virtual tokens before this base's "
            f"embedding need {wanted}"
        )
    return [Piece(site.module, prompt, {"vectors": vectors}, site.part)]


def _targets(file: AdapterFile, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers that `target_modules` names: a regular expression for the whole path, or a list of endings."""
    wanted = file.config.get("target_modules")
    if wanted is None:  # the fork has defaults by model type; the names of the tensors tell which modules these were
        wanted = sorted({name.rsplit(".", 2)[0] for name in file.left if ".lora_" in name or ".adapter_" in name})
    found = False
    for path, module in base_submodules(model):
        matches = pattern(wanted).fullmatch(path) if isinstance(wanted, str) else path.endswith(tuple(wanted))
        if matches and is_linear(module):
            found = True
            yield path, module
    if not found:
        raise GraftError(f"{file.folder}: target_modules {wanted!r} names no linear layer of this base")


def _bias(file: AdapterFile, path: str, module: Any) -> dict[str, Tensor]:
    """Return the difference to the layer's bias, if the file holds trained biases."""
    if file.config.get("bias", "none") == "none" or module.bias is None:
        return {}
    return {"bias": difference(file.take(f"{path}.bias"), module.bias)}


def _with_saved_modules(file: AdapterFile, model: nn.Module, pieces: list[Piece]) -> list[Piece]:
    """Add the modules that the file holds whole (`modules_to_save`, by the ends of their names). They replace other pieces there."""
    saved: list[Piece] = []
    wanted = tuple(file.config.get("modules_to_save") or ())
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for path, module in base_submodules(model) if wanted else ():
        if not path.endswith(wanted) or not isinstance(module, nn.Linear):
            continue
        if embedding is not None and embedding.weight is module.weight:
            raise GraftError(
                f"{file.folder} replaces '{path}', but in this base the input embedding shares its weight and would change too: load a "
                "base with tie_word_embeddings: false"
            )
        tensors = {"weight": difference(file.take(f"{path}.weight"), module.weight)}
        if module.bias is not None:
            tensors["bias"] = difference(file.take(f"{path}.bias"), module.bias)
        saved.append(Piece(path, Full(train_bias="bias" in tensors), tensors))
    replaced = {piece.path for piece in saved}
    return [piece for piece in pieces if piece.path not in replaced] + saved


READERS: dict[str, Callable[[AdapterFile, nn.Module], list[Piece]]] = {
    "LORA": _read_lora, "BOTTLENECK": _read_bottleneck, "PREFIX_TUNING": _read_prefix,
    "PROMPT_TUNING": _read_prompt, "P_TUNING": _read_prompt,
}  # fmt: skip
