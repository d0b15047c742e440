"""AdapterHub's bottleneck adapters (seq_bn, double_seq_bn, par_bn, AdapterPlus) and Compacter, read and written.

They are Graft's kinds series, parallel and compacter. Let h be a sublayer's output before the residual, r the residual stream, and LN the
norm that follows in post-norm models:

    original_ln_before    the bottleneck f reads LN(h + r), otherwise h; a parallel one reads r
    residual_before_ln    f's output is added to h, otherwise to what f has read
    then LN(... + r), as the model does anyway
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.compacter import Compacter
from graft.adapters.kinds.parallel import Parallel
from graft.adapters.kinds.series import Series
from graft.errors import GraftError
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.gates import gated
from graft.formats.adapterhub.places import (
    MLP_AFTER_ATTENTION,
    bottleneck_prefix,
    differing,
    left_out,
    model_type,
    outer,
    refuse,
)
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter

ACTIVATIONS = {"swish": "silu", "leakyrelu": "leaky_relu", "gelu_orig": "gelu"}
"""The library's names of activations, and what transformers calls them."""
UNUSED: dict[str, Any] = {
    "cross_adapter": False, "factorized_phm_W": True, "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "learn_phm": True, "phm_bias": True,
    "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False, "adapter_residual_before_ln": False,
}  # fmt: skip
"""Fields of the config, with the values that mean "not used"."""
NO_EQUAL = {
    "shared_W_phm": "one Kronecker factor for all layers",
}
"""Fields that have no equal in Graft, and what they turn on."""


def read_bottleneck(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Read a bottleneck adapter. Raises `GraftError` for settings that have no equal in Graft."""
    for field, what in NO_EQUAL.items():
        if config.get(field):
            raise GraftError(f"{file.folder} has {what} ({field}), which Graft has no kind for")
    if not config.get("original_ln_after", True):
        raise GraftError(
            f"{file.folder}: original_ln_after: false removes a norm of the base, which no kind of Graft does"
        )
    kind = getattr(file.model.config, "model_type", None)
    stream = config.get("original_ln_before") or config.get("is_parallel")
    if kind in MLP_AFTER_ATTENTION and stream and config.get("output_adapter"):
        raise GraftError(
            f"{file.folder}: in a {kind} the library's adapters at the MLP read a residual stream that already holds the attention's "
            "output, which no kind of Graft does"
        )
    flags = {"attn": "mh_adapter", "cross": "cross_adapter", "mlp": "output_adapter"}
    names = [name for name, flag in flags.items() if config.get(flag)]
    # The library adapts cross-attention along with attention in some models, without a flag: see what the file has.
    if "attn" in names and "cross" in file.site_table.names() and "cross" not in names and _has_cross(file):
        names.append("cross")
    sites = file.sublayers(*names, leave_out=tuple(config.get("leave_out") or ()))
    read = _read_compacter if config.get("phm_layer") else _read_dense
    pieces = [Piece(site.module, *read(file, config, prefix), site.part) for site, prefix in sites]
    if not config.get("use_gating"):
        return pieces
    if config.get("ln_after") or not config.get("residual_before_ln", True):
        raise GraftError(
            f"{file.folder}: gates with ln_after, or with residual_before_ln: false, have no equal in Graft"
        )
    return [gated(file, piece, f"{prefix}gate") for piece, (_, prefix) in zip(pieces, sites, strict=True)]


def _has_cross(file: HubFile) -> bool:
    """Whether the file has tensors of adapters at cross-attention."""
    return any(any(name.startswith(prefix) for name in file.left) for _, prefix in file.sublayers("cross") if prefix)


def _fields(config: Mapping[str, Any], bottleneck: int) -> dict[str, Any]:
    """Return the fields that all bottlenecks of Graft have."""
    scale, activation = config.get("scaling", 1.0), str(config["non_linearity"]).lower()
    return {
        "bottleneck": bottleneck,
        "activation": ACTIVATIONS.get(activation, activation),
        "scale": scale if isinstance(scale, str) else float(scale),
        "dropout": config.get("dropout") or 0.0,
        "norm": bool(config.get("ln_before")),
        "norm_after": bool(config.get("ln_after")),
    }


def _series_fields(file: HubFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a bottleneck in series reads, and what its output is added to."""
    if config.get("adapter_residual_before_ln") and config.get("ln_after"):
        raise GraftError(f"{file.folder}: adapter_residual_before_ln with ln_after has no equal in Graft")
    stream = bool(config.get("original_ln_before"))
    skip = "stream" if stream and not config.get("residual_before_ln", True) else "site"
    return {"reads": "stream" if stream else "site", "skip": skip}


def _read_dense(file: HubFile, config: Mapping[str, Any], prefix: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
    tensors, number = {}, 0
    if config.get("ln_before"):
        number = 1
        for name in ("weight", "bias"):
            tensors[f"f.norm.{name}"] = file.take(f"{prefix}adapter_norm_before.{name}")
            file.left.pop(f"{prefix}adapter_down.0.{name}", None)  # the library stores the norm twice
    for name in ("weight", "bias"):
        tensors[f"f.down.{name}"] = file.take(f"{prefix}adapter_down.{number}.{name}")
        tensors[f"f.up.{name}"] = file.take(f"{prefix}adapter_up.{name}")
        if config.get("ln_after"):
            tensors[f"f.norm_after.{name}"] = file.take(f"{prefix}adapter_norm_after.{name}")
    if isinstance(config.get("scaling"), str):
        tensors["f.scale"] = file.take(f"{prefix}scaling")
    fields = {**_fields(config, len(tensors["f.down.bias"]) or 1), "init": _init(config)}
    if config.get("is_parallel"):
        return Parallel(reads="stream", **fields), tensors
    return Series(**fields, **_series_fields(file, config)), tensors


def _init(config: Mapping[str, Any]) -> str:
    return {"mam_adapter": "mam", "houlsby": "houlsby"}.get(str(config.get("init_weights")), "bert")


def _read_compacter(file: HubFile, config: Mapping[str, Any], prefix: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
    low, tensors = bool(config["factorized_phm_W"]), {}
    for side, own in (("down", "adapter_down.0"), ("up", "adapter_up")):
        names = {"S": "W_left", "T": "W_right"} if low else {"B": "W"}
        for ours, theirs in names.items():
            tensors[f"f.{side}.{ours}"] = file.take(f"{prefix}{own}.{theirs}")
        if config["phm_bias"]:
            tensors[f"f.{side}.bias"] = file.take(f"{prefix}{own}.b")
        if not config["shared_phm_rule"]:
            for ours, theirs in _rule_names(config).items():
                tensors[f"f.{side}.rule.{ours}"] = file.take(f"{prefix}{own}.{theirs}")
    second = tensors["f.up.S" if low else "f.up.B"]
    width = second.shape[0] * second.shape[1] if second.dim() > 1 else 1
    fields: dict[str, Any] = {
        **_fields(config, width),
        **_series_fields(file, config),
        "products": config["phm_dim"],
        "rank": config["phm_rank"] if low else None,
        "rule_rank": config["phm_rank"] if config["factorized_phm_rule"] else None,
        "share_rule": config["shared_phm_rule"],
        "rule_std": config["phm_init_range"],
        "biases": config["phm_bias"],
    }
    return Compacter(**fields), tensors


def shared_rule(file: HubFile, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the rule that all layers of a Compacter share, under Graft's names; empty if they share none."""
    if not (config.get("phm_layer") and config["shared_phm_rule"]):
        return {}
    return {ours: file.shared(theirs) for ours, theirs in _rule_names(config).items()}


def _rule_names(config: Mapping[str, Any]) -> dict[str, str]:
    return (
        {"left": "phm_rule_left", "right": "phm_rule_right"} if config["factorized_phm_rule"] else {"rule": "phm_rule"}
    )


def write_series(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write bottlenecks in series. Return their config."""
    return _write_bottleneck(root, adapters, folder, name, parallel=False)


def write_parallel(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write parallel bottlenecks. Return their config."""
    return _write_bottleneck(root, adapters, folder, name, parallel=True)


def _write_bottleneck(
    root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str, parallel: bool
) -> dict[str, Any]:
    config: Any = adapters[0].config
    fields = _written_fields(root, adapters, parallel)
    refuse(
        "bottlenecks", {"bottlenecks without biases": not config.biases, "biases of adapted layers": config.train_bias}
    )
    for adapter in adapters:
        _write_tensors(adapter, bottleneck_prefix(root, adapter, name), folder)
    inits = {"mam": "mam_adapter", "houlsby": "houlsby"}
    return {**fields, "init_weights": inits.get(config.init, "bert")}


def _written_fields(root: nn.Module, adapters: Sequence[SiteAdapter], parallel: bool) -> dict[str, Any]:
    """Return the fields that bottlenecks and Compacter share. Raises `GraftError` for settings that the library cannot hold."""
    config: Any = adapters[0].config
    reads = {adapter.config.reads for adapter in adapters}
    refuse("bottlenecks", {
        "settings that differ between sites": differing(adapters),
        "sites other than attn, cross and mlp": any(
            adapter.installed.site.name.split(".")[-1] not in ("attn", "cross", "mlp") for adapter in adapters
        ),
        "hidden_dropout": getattr(config, "hidden_dropout", 0.0) > 0.0,
        "a bottleneck before a sublayer": getattr(config, "position", "after") != "after",
        "a bottleneck without a residual connection": getattr(config, "skip", "site") == "none",
        f"reads: stream at the mlp of a {model_type(root)}, which it reads after the attention": (
            model_type(root) in MLP_AFTER_ATTENTION and "stream" in reads
            and any(adapter.installed.site.part == "mlp" for adapter in adapters)
        ),
        "a parallel bottleneck on the sublayer's own input (reads: site)": parallel and reads != {"stream"} and not _same_input(adapters),
    })  # fmt: skip
    names = {adapter.installed.site.name.split(".")[-1] for adapter in adapters}
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "gelu_orig"}
    hidden = int(root.config.hidden_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return {
        **UNUSED, "mh_adapter": "attn" in names, "cross_adapter": "cross" in names, "output_adapter": "mlp" in names,
        "reduction_factor": hidden / config.bottleneck, "non_linearity": activations.get(config.activation, config.activation),
        "scaling": config.scale, "dropout": config.dropout, "ln_before": config.norm, "ln_after": config.norm_after,
        "is_parallel": parallel, "original_ln_before": not parallel and config.reads == "stream", "original_ln_after": True,
        "residual_before_ln": getattr(config, "skip", "site") != "stream", "leave_out": left_out(root, adapters, sorted(names)),
    }  # fmt: skip


def _write_tensors(adapter: SiteAdapter, prefix: str, folder: Folder) -> None:
    own = dict(adapter.module.f.named_parameters())
    first = 1 if adapter.config.norm else 0
    for end in ("weight", "bias"):
        folder.tensors[f"{prefix}adapter_down.{first}.{end}"] = own[f"down.{end}"]
        folder.tensors[f"{prefix}adapter_up.{end}"] = own[f"up.{end}"]
        if adapter.config.norm:
            folder.tensors |= {
                f"{prefix}{place}.{end}": own[f"norm.{end}"] for place in ("adapter_norm_before", "adapter_down.0")
            }
        if adapter.config.norm_after:
            folder.tensors[f"{prefix}adapter_norm_after.{end}"] = own[f"norm_after.{end}"]
    if "scale" in own:
        folder.tensors[f"{prefix}scaling"] = own["scale"]


def _same_input(adapters: Sequence[SiteAdapter]) -> bool:
    """Whether every sublayer's input is the residual stream itself, as in post-norm models."""
    return all(adapter.installed.site.source == adapter.installed.site.residual for adapter in adapters)


def write_compacter(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write Compacter. Return its config."""
    config: Any = adapters[0].config
    ranks = {rank for rank in (config.rank, config.rule_rank) if rank is not None}
    refuse("Compacter", {
        "norms": config.norm or config.norm_after, "a learned scale": isinstance(config.scale, str),
        "biases of adapted layers": config.train_bias, "two ranks (rank and rule_rank)": len(ranks) > 1,
    })  # fmt: skip
    rules = {"left": "phm_rule_left", "right": "phm_rule_right", "rule": "phm_rule"}
    ends = {"S": "W_left", "T": "W_right", "B": "W", "bias": "b"} | {
        f"rule.{ours}": theirs for ours, theirs in rules.items()
    }
    for adapter in adapters:
        prefix = bottleneck_prefix(root, adapter, name)
        for ours, tensor in adapter.module.f.named_parameters():
            side, _, end = ours.partition(".")
            folder.tensors[f"{prefix}{ {'down': 'adapter_down.0', 'up': 'adapter_up'}[side] }.{ends[end]}"] = tensor
    if config.share_rule:
        (rule,) = adapters[0].module._shared
        folder.tensors |= {
            f"{outer(root)}shared_parameters.{name}.{rules[ours]}": own for ours, own in rule.named_parameters()
        }
    return {
        **_written_fields(root, adapters, parallel=False),
        "phm_layer": True, "phm_dim": config.products, "phm_rank": ranks.pop() if ranks else 1,
        "factorized_phm_W": config.rank is not None, "factorized_phm_rule": config.rule_rank is not None,
        "shared_phm_rule": config.share_rule, "phm_init_range": config.rule_std, "phm_bias": config.biases, "init_weights": "bert",
    }  # fmt: skip
