"""Write an attached adapter as AdapterHub stores it: bottlenecks and LoRA; what it cannot hold is refused.

The names' meaning is said in `bottlenecks.py` and `others.py`, which read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.atlas import Atlas
from graft.errors import GraftError
from graft.interop.adapterhub.bottlenecks import ACTIVATIONS
from graft.interop.peft.folder import Folder, Held
from graft.interop.peft.writing import held_by
from graft.state import State

CONTAINERS = ("llama", "mistral", "gpt2", "gptj")
"""Model types whose blocks hold `attention_adapters` and `output_adapters`."""
DENSE = ("bert", "roberta", "electra", "xlm-roberta")
"""Model types whose adapters sit beside the sublayer's last layer."""
BEHIND = ("t5", "mt5")
"""Model types whose adapters sit in `layer.N` of the block."""
UNUSED: dict[str, Any] = {
    "cross_adapter": False, "factorized_phm_W": True, "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "learn_phm": True, "phm_bias": True,
    "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False, "adapter_residual_before_ln": False,
}  # fmt: skip


def write(root: nn.Module, state: State, name: str) -> Folder:
    """An adapter as AdapterHub stores it. Raises `GraftError` for kinds, combinations, settings and models that its files cannot say."""
    seats = held_by(root, state, name)
    kinds = {held.config.kind for held in seats}
    config: Any = root.config
    folder = Folder()
    if kinds in ({"series"}, {"parallel"}):
        _bottleneck(root, seats, folder, name, kinds == {"parallel"})
    elif kinds == {"lora"}:
        _lora(root, seats, folder, name)
    else:
        raise GraftError(
            f"Graft writes series, parallel and lora adapters in AdapterHub's format, one kind to a folder; '{name}' is "
            f"{' and '.join(sorted(kinds))}"
        )
    folder.config = {"config": folder.config, "hidden_size": config.hidden_size, "model_class": type(root).__name__, "model_name":
                     getattr(config, "_name_or_path", None), "model_type": config.model_type, "name": name,
                     "version": "adapters.1.3.0"}  # fmt: skip
    folder.tensors = {key: tensor.detach() for key, tensor in folder.tensors.items()}
    return folder


def _bottleneck(root: nn.Module, seats: Sequence[Held], folder: Folder, name: str, beside: bool) -> None:
    config: Any = seats[0].config
    reads = {held.config.reads for held in seats}
    plain = {held.config.model_copy(update={"sites": ""}).model_dump_json() for held in seats}
    wrong = [what for what, holds in {
        "settings that differ between sites": len(plain) > 1,
        "bottlenecks without biases": not config.biases, "biases of adapted layers": config.train_bias,
        "sites other than attn, cross and mlp": any(held.seat.site.name.split(".")[-1] not in ("attn", "cross", "mlp") for held in seats),
        "a bottleneck before a sublayer": getattr(config, "position", "after") != "after",
        "a bottleneck that is added to nothing": getattr(config, "skip", "site") == "none",
        "a parallel bottleneck on the sublayer's own input (reads: site)": beside and reads != {"stream"} and not _same_input(seats),
    }.items() if holds]  # fmt: skip
    if wrong:
        raise GraftError(f"AdapterHub's bottlenecks cannot say {' or '.join(wrong)}: keep Graft's format")
    sites = {held.seat.site.part for held in seats}
    backwards = {theirs_to: theirs for theirs, theirs_to in ACTIVATIONS.items() if theirs != "gelu_orig"}
    hidden = int(root.config.hidden_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    folder.config |= {
        **UNUSED, "mh_adapter": "attn" in sites, "cross_adapter": False, "output_adapter": "mlp" in sites,
        "reduction_factor": hidden / config.bottleneck, "non_linearity": backwards.get(config.activation, config.activation),
        "scaling": config.scale, "dropout": config.dropout, "ln_before": config.norm, "ln_after": config.norm_after,
        "is_parallel": beside, "original_ln_before": not beside and config.reads == "stream", "original_ln_after": True,
        "residual_before_ln": getattr(config, "skip", "site") != "stream", "leave_out": _left_out(root, seats),
        "init_weights": {"mam": "mam_adapter", "houlsby": "houlsby"}.get(config.init, "bert"),
    }  # fmt: skip
    for held in seats:
        _bottleneck_tensors(held, _prefix(root, held, name), folder)


def _bottleneck_tensors(held: Held, prefix: str, folder: Folder) -> None:
    own = dict(held.module.f.named_parameters())
    first = 1 if held.config.norm else 0
    for end in ("weight", "bias"):
        folder.tensors[f"{prefix}adapter_down.{first}.{end}"] = own[f"down.{end}"]
        folder.tensors[f"{prefix}adapter_up.{end}"] = own[f"up.{end}"]
        if held.config.norm:
            folder.tensors |= {
                f"{prefix}{place}.{end}": own[f"norm.{end}"] for place in ("adapter_norm_before", "adapter_down.0")
            }
        if held.config.norm_after:
            folder.tensors[f"{prefix}adapter_norm_after.{end}"] = own[f"norm_after.{end}"]
    if "scale" in own:
        folder.tensors[f"{prefix}scaling"] = own["scale"]


def _same_input(seats: Sequence[Held]) -> bool:
    """Whether every sublayer's input is the residual stream itself (post-norm families)."""
    return all(held.seat.site.source == held.seat.site.residual for held in seats)


def _left_out(root: nn.Module, seats: Sequence[Held]) -> list[int]:
    """Layers without an adapter. Raises `GraftError` where sites differ in them."""
    every = {block.number for block in Atlas(root).blocks}
    layers = {
        part: {held.seat.site.layer for held in seats if held.seat.site.part == part}
        for part in {h.seat.site.part for h in seats}
    }
    first, *others = layers.values()
    if any(other != first for other in others):
        raise GraftError("AdapterHub leaves out whole layers; this adapter has attn and mlp in different ones")
    return sorted(every - first)


def _prefix(root: nn.Module, held: Held, name: str) -> str:
    kind, site = str(root.config.model_type), held.seat.site  # pyright: ignore[reportAttributeAccessIssue]
    if kind in CONTAINERS:
        block = next(block.path for block in Atlas(root).blocks if site.module.startswith(f"{block.path}."))
        return f"{block}.{'attention' if site.part == 'attn' else 'output'}_adapters.adapters.{name}."
    if kind in DENSE:
        return f"{site.module.rpartition('.')[0]}.adapters.{name}."
    if kind in BEHIND:
        head, number = site.module.split(".layer.")[0], site.module.split(".layer.")[1].split(".")[0]
        return f"{head}.layer.{number}.adapters.{name}."
    raise GraftError(
        f"where AdapterHub has the bottlenecks of a '{kind}' is not known here; known: {', '.join((*CONTAINERS, *DENSE, *BEHIND))}"
    )


def _lora(root: nn.Module, seats: Sequence[Held], folder: Folder, name: str) -> None:
    config: Any = seats[0].config
    names = {held.seat.site.name for held in seats}
    allowed = {"attn.q", "attn.k", "attn.v", "cross.q", "cross.k", "cross.v", "mlp.up", "mlp.gate", "mlp.down"}
    plain = {held.config.model_copy(update={"sites": ""}).model_dump_json() for held in seats}
    wrong = [what for what, holds in {
        "ranks or settings that differ between sites": len(plain) > 1,
        "alpha / sqrt(rank)": config.rslora, "biases": config.train_bias,
        f"sites other than {', '.join(sorted(allowed))}": bool(names - allowed),
        "slices of a fused projection": any(held.seat.site.rows is not None for held in seats),
        "some layers of a site only": any(
            {h.path for h in seats if h.seat.site.name == each} != {site.module for site in Atlas(root).table()[each]} for each in names
        ) if names <= allowed else False,
    }.items() if holds]  # fmt: skip
    if wrong:
        raise GraftError(
            f"AdapterHub's LoRA cannot say {' or '.join(wrong)} (as Graft writes it): export to PEFT, or keep Graft's format"
        )
    folder.config |= {
        "architecture": "lora", "r": config.rank, "alpha": config.alpha, "dropout": config.dropout, "composition_mode": "add",
        "attn_matrices": sorted({each[-1] for each in names if each[-2] == "."}, key="qkv".index), "selfattn_lora": True,
        "intermediate_lora": bool(names & {"mlp.up", "mlp.gate"}), "output_lora": "mlp.down" in names, "init_weights": "lora",
        "leave_out": [], "use_gating": False, "use_dora": False, "vera_b": None, "vera_d": None,
    }  # fmt: skip
    for held in seats:
        own = dict(held.module.named_parameters())
        folder.tensors |= {f"{held.path}.loras.{name}.lora_{letter}": own[letter] for letter in "AB"}
