"""Write an attached adapter as AdapterHub stores it; what it cannot hold is refused with the reason.

The names' meaning is said in `bottlenecks.py`, `others.py` and `heads.py`, which read them. Several kinds in one adapter are a union there
(MAM: a prefix and a parallel bottleneck).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from graft.errors import GraftError
from graft.formats.adapterhub.bottlenecks import ACTIVATIONS
from graft.formats.adapterhub.heads import write_head
from graft.formats.adapterhub.linears_writing import write_dora, write_ia3, write_lora
from graft.formats.adapterhub.others_writing import write_prefix, write_prompt, write_reft
from graft.formats.adapterhub.places import (
    STREAM_GOES_ON,
    bottleneck_prefix,
    differing,
    left_out,
    model_type,
    outer,
    refuse,
)
from graft.formats.peft.folder import Folder, Held
from graft.formats.peft.writing import held_by
from graft.injection.state import State

UNUSED: dict[str, Any] = {
    "cross_adapter": False, "factorized_phm_W": True, "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "learn_phm": True, "phm_bias": True,
    "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False, "adapter_residual_before_ln": False,
}  # fmt: skip
NOTE = "load it in AdapterHub with load_adapter(FOLDER, use_safetensors=True)"


def write(root: nn.Module, state: State, name: str) -> Folder:
    """An adapter as AdapterHub stores it. Raises `GraftError` for kinds, combinations, settings and models that its files cannot say."""
    by_kind: dict[str, list[Held]] = defaultdict(list)
    for held in held_by(root, state, name):
        by_kind[held.config.kind].append(held)
    head = by_kind.pop("head", [])
    unknown = sorted(set(by_kind) - set(WRITERS))
    if unknown or not by_kind:
        raise GraftError(
            f"AdapterHub has no kind that computes what {' and '.join(unknown or ['a head alone'])} does, or its file forgets how. "
            f"Written are: {', '.join(WRITERS)}, and a classifier's head beside them"
        )
    config: Any = root.config
    folder, kind = Folder(notes=[NOTE]), model_type(root)
    configs = [WRITERS[each](root, installs, folder, name) for each, installs in by_kind.items()]
    about = {"hidden_size": config.hidden_size, "model_class": type(root).__name__, "model_name": getattr(config, "_name_or_path", None),
             "model_type": kind, "name": name, "version": "adapters.1.3.0"}  # fmt: skip
    whole = configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}
    folder.config = {"config": whole, **about}
    if head:
        write_head(root, head, folder, about)
    folder.tensors = {key: tensor.detach() for key, tensor in folder.tensors.items()}
    return folder


def _series(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    return _bottleneck(root, installs, folder, name, beside=False)


def _parallel(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    return _bottleneck(root, installs, folder, name, beside=True)


def _bottleneck(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str, beside: bool) -> dict[str, Any]:
    config: Any = installs[0].config
    fields = _common(root, installs, beside)
    refuse(
        "bottlenecks", {"bottlenecks without biases": not config.biases, "biases of adapted layers": config.train_bias}
    )
    for held in installs:
        _bottleneck_tensors(held, bottleneck_prefix(root, held, name), folder)
    inits = {"mam": "mam_adapter", "houlsby": "houlsby"}
    return {**fields, "init_weights": inits.get(config.init, "bert")}


def _common(root: nn.Module, installs: Sequence[Held], beside: bool) -> dict[str, Any]:
    """The fields of bottlenecks and of Compacter. Raises `GraftError` for what they cannot say."""
    config: Any = installs[0].config
    reads = {held.config.reads for held in installs}
    refuse("bottlenecks", {
        "settings that differ between sites": differing(installs),
        "sites other than attn, cross and mlp": any(
            held.installed.site.name.split(".")[-1] not in ("attn", "cross", "mlp") for held in installs
        ),
        "a bottleneck before a sublayer": getattr(config, "position", "after") != "after",
        "a bottleneck that is added to nothing": getattr(config, "skip", "site") == "none",
        f"reads: stream at the mlp of a {model_type(root)}, whose stream it takes behind the attention": (
            model_type(root) in STREAM_GOES_ON and "stream" in reads and any(held.installed.site.part == "mlp" for held in installs)
        ),
        "a parallel bottleneck on the sublayer's own input (reads: site)": beside and reads != {"stream"} and not _same_input(installs),
    })  # fmt: skip
    names = {held.installed.site.name.split(".")[-1] for held in installs}
    backwards = {theirs_to: theirs for theirs, theirs_to in ACTIVATIONS.items() if theirs != "gelu_orig"}
    hidden = int(root.config.hidden_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return {
        **UNUSED, "mh_adapter": "attn" in names, "cross_adapter": "cross" in names, "output_adapter": "mlp" in names,
        "reduction_factor": hidden / config.bottleneck, "non_linearity": backwards.get(config.activation, config.activation),
        "scaling": config.scale, "dropout": config.dropout, "ln_before": config.norm, "ln_after": config.norm_after,
        "is_parallel": beside, "original_ln_before": not beside and config.reads == "stream", "original_ln_after": True,
        "residual_before_ln": getattr(config, "skip", "site") != "stream", "leave_out": left_out(root, installs, sorted(names)),
    }  # fmt: skip


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


def _same_input(installs: Sequence[Held]) -> bool:
    """Whether every sublayer's input is the residual stream itself (post-norm families)."""
    return all(held.installed.site.source == held.installed.site.residual for held in installs)


def _compacter(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    config: Any = installs[0].config
    ranks = {rank for rank in (config.rank, config.rule_rank) if rank is not None}
    refuse("Compacter", {
        "norms": config.norm or config.norm_after, "a learned scale": isinstance(config.scale, str),
        "biases of adapted layers": config.train_bias, "two ranks (rank and rule_rank)": len(ranks) > 1,
    })  # fmt: skip
    rules = {"left": "phm_rule_left", "right": "phm_rule_right", "rule": "phm_rule"}
    ends = {"S": "W_left", "T": "W_right", "B": "W", "bias": "b"} | {
        f"rule.{ours}": theirs for ours, theirs in rules.items()
    }
    for held in installs:
        prefix = bottleneck_prefix(root, held, name)
        for ours, tensor in held.module.f.named_parameters():
            side, _, end = ours.partition(".")
            folder.tensors[f"{prefix}{ {'down': 'adapter_down.0', 'up': 'adapter_up'}[side] }.{ends[end]}"] = tensor
    if config.share_rule:
        (rule,) = installs[0].module._shared
        folder.tensors |= {
            f"{outer(root)}shared_parameters.{name}.{rules[ours]}": own for ours, own in rule.named_parameters()
        }
    return {
        **_common(root, installs, beside=False), "phm_layer": True, "phm_dim": config.products, "phm_rank": ranks.pop() if ranks else 1,
        "factorized_phm_W": config.rank is not None, "factorized_phm_rule": config.rule_rank is not None,
        "shared_phm_rule": config.share_rule, "phm_init_range": config.rule_std, "phm_bias": config.biases, "init_weights": "bert",
    }  # fmt: skip


Writer = Callable[[nn.Module, Sequence[Held], Folder, str], dict[str, Any]]
WRITERS: dict[str, Writer] = {
    "series": _series, "parallel": _parallel, "compacter": _compacter, "lora": write_lora, "dora": write_dora, "ia3": write_ia3,
    "prefix": write_prefix, "prompt": write_prompt, "p-tuning": write_prompt, "reft": write_reft,
}  # fmt: skip
"""What writes the tensors of one kind, and gives its config."""
