"""AdapterHub's bottleneck adapters (seq_bn, double_seq_bn, par_bn, AdapterPlus) and Compacter, as series, parallel and compacter kinds.

With h a sublayer's output before the residual, r the residual stream and LN the norm after it in post-norm families:

    original_ln_before    f reads LN(h + r), else h; in parallel it reads r
    residual_before_ln    f is added to h, else to what f read
    then LN(... + r), as the family does anyway
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.compacter import Compacter
from graft.adapters.kinds.parallel import Parallel
from graft.adapters.kinds.series import Series
from graft.errors import GraftError
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.places import STREAM_GOES_ON
from graft.formats.composing import Piece

ACTIVATIONS = {"swish": "silu", "leakyrelu": "leaky_relu", "gelu_orig": "gelu"}
"""The library's names of activations that transformers calls otherwise."""
NO_EQUAL = {
    "use_gating": "gates (as in UniPELT)",
    "inv_adapter": "invertible adapters",
    "shared_W_phm": "one Kronecker factor for all layers",
}


def read_bottleneck(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """The pieces of a bottleneck adapter. Raises `GraftError` for what has no equal in Graft."""
    for field, what in NO_EQUAL.items():
        if config.get(field):
            raise GraftError(f"{file.folder} has {what} ({field}), which Graft has no kind for")
    if not config.get("original_ln_after", True):
        raise GraftError(f"{file.folder}: original_ln_after: false takes away a norm of the base, which no kind does")
    kind = getattr(file.model.config, "model_type", None)
    stream = config.get("original_ln_before") or config.get("is_parallel")
    if kind in STREAM_GOES_ON and stream and config.get("output_adapter"):
        raise GraftError(
            f"{file.folder}: on a {kind} the library's adapters at the MLP read a residual stream with the attention's output in it, "
            "which no kind of Graft does"
        )
    flags = {"attn": "mh_adapter", "cross": "cross_adapter", "mlp": "output_adapter"}
    names = [name for name, flag in flags.items() if config.get(flag)]
    if "attn" in names and "cross" in file.site_table.names() and "cross" not in names and _has_cross(file):
        names.append("cross")
    sites = file.sublayers(*names, leave_out=tuple(config.get("leave_out") or ()))
    read = _compacter if config.get("phm_layer") else _dense
    return [Piece(site.module, *read(file, config, prefix), site.part) for site, prefix in sites]


def _has_cross(file: HubFile) -> bool:
    return any(any(name.startswith(prefix) for name in file.left) for _, prefix in file.sublayers("cross") if prefix)


def _common(config: Mapping[str, Any], bottleneck: int) -> dict[str, Any]:
    scale, activation = config.get("scaling", 1.0), str(config["non_linearity"]).lower()
    return {
        "bottleneck": bottleneck,
        "activation": ACTIVATIONS.get(activation, activation),
        "scale": scale if isinstance(scale, str) else float(scale),
        "dropout": config.get("dropout") or 0.0,
        "norm": bool(config.get("ln_before")),
        "norm_after": bool(config.get("ln_after")),
    }


def _in_line(file: HubFile, config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("adapter_residual_before_ln") and config.get("ln_after"):
        raise GraftError(f"{file.folder}: adapter_residual_before_ln with ln_after has no equal in Graft")
    stream = bool(config.get("original_ln_before"))
    skip = "stream" if stream and not config.get("residual_before_ln", True) else "site"
    return {"reads": "stream" if stream else "site", "skip": skip}


def _dense(file: HubFile, config: Mapping[str, Any], prefix: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
    tensors, number = {}, 0
    if config.get("ln_before"):
        number = 1
        for name in ("weight", "bias"):
            tensors[f"f.norm.{name}"] = file.take(f"{prefix}adapter_norm_before.{name}")
            file.left.pop(f"{prefix}adapter_down.0.{name}", None)  # the same norm again
    for name in ("weight", "bias"):
        tensors[f"f.down.{name}"] = file.take(f"{prefix}adapter_down.{number}.{name}")
        tensors[f"f.up.{name}"] = file.take(f"{prefix}adapter_up.{name}")
        if config.get("ln_after"):
            tensors[f"f.norm_after.{name}"] = file.take(f"{prefix}adapter_norm_after.{name}")
    if isinstance(config.get("scaling"), str):
        tensors["f.scale"] = file.take(f"{prefix}scaling")
    fields = {**_common(config, len(tensors["f.down.bias"]) or 1), "init": _init(config)}
    if config.get("is_parallel"):
        return Parallel(reads="stream", **fields), tensors
    return Series(**fields, **_in_line(file, config)), tensors


def _init(config: Mapping[str, Any]) -> str:
    return {"mam_adapter": "mam", "houlsby": "houlsby"}.get(str(config.get("init_weights")), "bert")


def _compacter(file: HubFile, config: Mapping[str, Any], prefix: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
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
        **_common(config, width),
        **_in_line(file, config),
        "products": config["phm_dim"],
        "rank": config["phm_rank"] if low else None,
        "rule_rank": config["phm_rank"] if config["factorized_phm_rule"] else None,
        "share_rule": config["shared_phm_rule"],
        "rule_std": config["phm_init_range"],
        "biases": config["phm_bias"],
    }
    return Compacter(**fields), tensors


def shared_rule(file: HubFile, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The rule that all layers of a Compacter share, by our names."""
    if not (config.get("phm_layer") and config["shared_phm_rule"]):
        return {}
    return {ours: file.shared(theirs) for ours, theirs in _rule_names(config).items()}


def _rule_names(config: Mapping[str, Any]) -> dict[str, str]:
    return (
        {"left": "phm_rule_left", "right": "phm_rule_right"} if config["factorized_phm_rule"] else {"rule": "phm_rule"}
    )
