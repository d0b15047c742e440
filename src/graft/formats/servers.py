"""What servers take of a PEFT LoRA folder, and how to get there: vLLM, SGLang and TGI read less than PEFT writes, and some are silent.

    all      LoRA alone: no DoRA, no biases, no modules_to_save, no token rows, no embeddings
    vLLM     one rank and one alpha for all layers (patterns are not read)
    SGLang   q, k, v together, and gate, up together (older loaders join them)
    TGI      no patterns, and every adapted layer type in every layer (a gap drops the type everywhere)

Conversions: patterns become one rank by zero rows and columns, scales move into B, missing partners become zero LoRAs (all exact); other
linear adapters become LoRAs by truncated singular value decomposition, whose error is reported.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.adapters.base import fold_steps
from graft.architectures.layers import is_linear, is_transposed, widths
from graft.errors import GraftError, did_you_mean
from graft.formats.peft.folder import Folder, Held
from graft.formats.peft.naming import shortest_names

Server = Literal["vllm", "sglang", "tgi"]
SERVERS: tuple[Server, ...] = ("vllm", "sglang", "tgi")
PARTNERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROOT = "base_model.model."


def fitted(root: nn.Module, folder: Folder, server: str, *, convert: bool) -> Folder:
    """A folder that a server reads whole. Raises `GraftError` that lists what it would not, or misread.

    convert: make what can be made exactly (one rank, partners).
    """
    if server not in SERVERS:
        raise GraftError(f"unknown server '{server}'.{did_you_mean(server, SERVERS)} There are: {', '.join(SERVERS)}")
    _refuse(folder, server)
    pairs = _pairs(folder)
    uniform = not folder.config["rank_pattern"] and not folder.config["alpha_pattern"]
    absent = _absent(root, set(pairs), server)
    wishes = [] if uniform or server == "sglang" else ["one rank and one alpha for all layers"]
    wishes += [f"LoRAs at {', '.join(absent[:4])}{' and others' if len(absent) > 4 else ''} too"] if absent else []
    if wishes and not convert:
        raise GraftError(
            f"{server} needs {' and '.join(wishes)}: --convert makes these exactly (zero rows and columns)"
        )
    if not wishes:
        return folder
    return _uniform(root, folder, pairs, absent)


def _refuse(folder: Folder, server: str) -> None:
    config = folder.config
    if config.get("peft_type") != "LORA":
        raise GraftError(
            f"{server} serves LoRA only; this is {config.get('peft_type')}: --svd RANK makes a LoRA of it, with an error"
        )
    wrong = [
        what
        for field, what in {"use_dora": "DoRA's magnitudes", "lora_bias": "biases", "modules_to_save": "whole modules",
                            "target_parameters": "LoRAs on experts", "trainable_token_indices": "token rows"}.items()
        if config.get(field)
    ]  # fmt: skip
    wrong += ["a LoRA on the embedding"] if any(".lora_embedding_" in name for name in folder.tensors) else []
    if wrong:
        raise GraftError(
            f"{server} does not read {' and '.join(wrong)} of a LoRA folder, and would serve another model. Merge the adapter into the "
            "base (graft merge), or --svd RANK for what is linear"
        )


def _pairs(folder: Folder) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A, B)."""
    ends = (".lora_A.weight", ".lora_B.weight")
    paths = [name.removeprefix(ROOT).removesuffix(ends[0]) for name in folder.tensors if name.endswith(ends[0])]
    return {
        path: (folder.tensors[f"{ROOT}{path}{ends[0]}"], folder.tensors[f"{ROOT}{path}{ends[1]}"]) for path in paths
    }


def _absent(root: nn.Module, have: set[str], server: str) -> list[str]:
    """Linear layers without a LoRA that the server needs one at."""
    linears = [path for path, module in root.named_modules() if is_linear(module) and "graft" not in path.split(".")]
    types = {path.rsplit(".", 1)[-1] for path in have}
    if server == "tgi":
        return [path for path in linears if path not in have and path.rsplit(".", 1)[-1] in types]
    if server == "vllm":
        return []
    wanted = {f"{path.rpartition('.')[0]}.{other}" for path in have for group in PARTNERS
              if path.rsplit(".", 1)[-1] in group for other in group}  # fmt: skip
    return [path for path in linears if path in wanted - have]


def _uniform(root: nn.Module, folder: Folder, pairs: dict[str, tuple[Tensor, Tensor]], absent: list[str]) -> Folder:
    """One rank R and alpha R for all: A and B padded by zeros, each layer's own scale in B."""
    config = folder.config
    rank = max(A.shape[0] for A, _ in pairs.values())
    found: dict[str, Tensor] = {}
    for path, (A, B) in pairs.items():
        own = A.shape[0]
        alpha = _own(config["alpha_pattern"], path, config["lora_alpha"])
        scale = alpha / (own**0.5 if config["use_rslora"] else own)
        found[f"{path}.lora_A.weight"] = torch.cat([A, A.new_zeros(rank - own, A.shape[1])])
        found[f"{path}.lora_B.weight"] = torch.cat([B * scale, B.new_zeros(len(B), rank - own)], 1)
    like = next(iter(pairs.values()))[0]
    for path in absent:
        into, out = widths(root.get_submodule(path), path)
        found[f"{path}.lora_A.weight"], found[f"{path}.lora_B.weight"] = (
            like.new_zeros(rank, into),
            like.new_zeros(out, rank),
        )
    names = {"layers_to_transform": None, "layers_pattern": None, **shortest_names(root, [*pairs, *absent])}
    changed = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, **names}
    notes = [*folder.notes, f"one rank of {rank} for all layers, the scales in B (exact)"]
    notes += [f"zero LoRAs at {len(absent)} more layers"] if absent else []
    return Folder({**config, **changed}, {ROOT + name: tensor for name, tensor in found.items()}, notes=notes)


def _own(pattern: dict[str, Any], path: str, usual: float) -> float:
    return pattern.get("^" + path.replace(".", r"\."), usual)


@torch.no_grad()
def by_svd(root: nn.Module, installs: list[Held], rank: int) -> Folder:
    """Any adapter that folds, as LoRAs of one rank: the best approximation of its difference to each weight. Notes say the error.

    Raises `GraftError` for adapters that do not fold or touch anything but linear layers' weights.
    """
    by_path: dict[str, list[Held]] = defaultdict(list)
    for held in installs:
        if not held.config.folds or held.installed.site.type != "linear":
            raise GraftError(
                f"'{held.config.kind}' at '{held.path}' is no difference to a linear layer's weight: it has no equal LoRA"
            )
        by_path[held.path].append(held)
    tensors, worst, missed, total = {}, 0.0, 0.0, 0.0
    for path, own in by_path.items():
        delta = _difference(root.get_submodule(path), path, own)
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        kept = min(rank, len(values))
        root_values = values[:kept].sqrt()
        A, B = root_values[:, None] * right[:kept], left[:, :kept] * root_values
        A, B = torch.cat([A, A.new_zeros(rank - kept, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), rank - kept)], 1)
        tensors |= {f"{ROOT}{path}.lora_A.weight": A, f"{ROOT}{path}.lora_B.weight": B}
        lost, whole = float(values[kept:].square().sum()), float(values.square().sum())
        worst, missed, total = max(worst, (lost / whole) ** 0.5 if whole else 0.0), missed + lost, total + whole
    config = {"auto_mapping": None, "inference_mode": True, "revision": None, "peft_version": "0.21.2", "peft_type": "LORA",
              "r": rank, "lora_alpha": rank, "use_rslora": False, "use_dora": False, "lora_dropout": 0.0, "bias": "none",
              "lora_bias": False, "fan_in_fan_out": all(is_transposed(root.get_submodule(path)) for path in by_path),
              "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
              "task_type": None, "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
              **shortest_names(root, list(by_path))}  # fmt: skip
    error = (missed / total) ** 0.5 if total else 0.0
    note = f"LoRAs of rank {rank} by singular value decomposition: {error:.2%} of the difference (Frobenius) is lost, {worst:.2%} at worst"
    return Folder(config, tensors, notes=[note])


def _difference(host: Any, path: str, own: list[Held]) -> Tensor:
    """What all parts of an adapter add to one weight [O, I], in float32."""
    stored = host.weight.detach()
    weight = (stored.t() if is_transposed(host) else stored).float()
    whole, bias = weight.clone(), getattr(host, "bias", None)
    bias = None if bias is None else bias.detach().float()
    parts = [
        (held.module, slice(None) if held.installed.site.rows is None else held.installed.site.rows) for held in own
    ]
    for fold, rows in fold_steps(parts):
        new, new_bias = fold(whole[rows], None if bias is None else bias[rows])
        whole[rows] = new
        if new_bias is not None and (bias is None or not torch.equal(new_bias, bias[rows])):
            raise GraftError(f"the adapter changes the bias of '{path}', which a LoRA cannot")
    return whole - weight
