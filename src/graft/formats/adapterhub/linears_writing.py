"""LoRA, DoRA and (IA)3 as AdapterHub stores them: one config, on queries, keys and values of all attentions and on the MLP's layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.layers import is_transposed
from graft.errors import GraftError
from graft.formats.adapterhub.places import REVERSED, differing, model_type, refuse
from graft.formats.peft.folder import Folder, Held
from graft.injection.state import site_table_of

COMMON: dict[str, Any] = {
    "architecture": "lora", "dtype": None, "init_weights_seed": None, "leave_out": [], "use_dora": False, "use_gating": False,
    "vera_b": None, "vera_d": None,
}  # fmt: skip


def write_lora(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    """LoRA of one rank and alpha."""
    config: Any = installs[0].config
    refuse("LoRA", {
        "ranks or settings that differ between sites": differing(installs),
        "alpha / sqrt(rank)": config.rslora, "biases": config.train_bias, **_places(root, installs),
    })  # fmt: skip
    for letter in "AB":
        tensors = _by_module(root, installs, lambda held, letter=letter: getattr(held.module, letter))
        folder.tensors |= {f"{path}.loras.{name}.lora_{letter}": tensor for path, tensor in tensors.items()}
    return {**COMMON, **_flags(root, installs), "r": config.rank,
            "alpha": config.alpha, "dropout": config.dropout, "composition_mode": "add",
            "init_weights": "lora"}  # fmt: skip


@torch.no_grad()
def write_dora(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    """DoRA where the library's form has an equal: its gain g = m / ||W + B A|| acts on the layer's bias too."""
    config: Any = installs[0].config
    refuse("DoRA", {
        "ranks or settings that differ between sites": differing(installs), "alpha / sqrt(rank)": config.rslora,
        "slices of a fused projection or transposed layers": any(
            held.installed.site.rows is not None or is_transposed(root.get_submodule(held.path)) for held in installs
        ), **_places(root, installs),
    })  # fmt: skip
    for held in installs:
        host, module = root.get_submodule(held.path), held.module
        weight, delta = host.weight.detach().float(), (module.B @ module.A).float()  # pyright: ignore[reportCallIssue]
        gain = module.magnitude / (weight + module.scale * delta).norm(dim=1)
        _refuse_bias(host, module, gain, held.path)
        prefix = f"{held.path}.loras.{name}."
        magnitude = gain * (weight + delta).norm(dim=1)
        folder.tensors |= {
            f"{prefix}lora_A": module.A,
            f"{prefix}lora_B": module.B,
            f"{prefix}m.weight": magnitude[:, None],
        }
    return {**COMMON, **_flags(root, installs), "r": config.rank,
            "alpha": config.alpha, "dropout": config.dropout, "composition_mode": "add",
            "init_weights": "lora", "use_dora": True}  # fmt: skip


def _refuse_bias(host: Any, module: Any, gain: Tensor, path: str) -> None:
    own = host.bias if host.bias is not None else torch.zeros(())
    learned = module.bias if module.bias is not None else torch.zeros(())
    wanted = (gain - 1) * own.float()
    if (learned - wanted).abs().max() > 1e-5 * wanted.abs().max().clamp(min=1.0):
        raise GraftError(
            f"AdapterHub's DoRA scales a layer's bias together with its weight, and this one leaves the bias of '{path}' as it is, or "
            "learned another: keep Graft's format, or export to PEFT"
        )


def write_ia3(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    """Factors on outputs."""
    refuse("(IA)3", {
        "factors on the input of a layer (set inputs: [] and name the layer before it)": any(
            held.module.scale.numel() != held.installed.site.out_features or type(held.module).__name__ == "InputScaling"
            for held in installs
        ), **_places(root, installs),
    })  # fmt: skip
    tensors = _by_module(root, installs, lambda held: held.module.scale[:, None])
    folder.tensors |= {f"{path}.loras.{name}.lora_B": tensor for path, tensor in tensors.items()}
    return {
        **COMMON,
        **_flags(root, installs),
        "r": 1,
        "alpha": 1,
        "dropout": 0.0,
        "composition_mode": "scale",
        "init_weights": "ia3",
    }


def _layers(root: nn.Module) -> tuple[str, str]:
    """The site names of what the library calls the intermediate layer and the output layer."""
    return ("mlp.down", "mlp.up") if model_type(root) in REVERSED else ("mlp.up", "mlp.down")


def _places(root: nn.Module, installs: Sequence[Held]) -> dict[str, bool]:
    """What is wrong with the places, for `refuse`."""
    names, table = {held.installed.site.name for held in installs}, site_table_of(root).by_name
    letters = [f"{part}.{letter}" for part in ("attn", "cross") for letter in "qkv"]
    allowed = [name for name in (*letters, *_layers(root)) if name in table]
    attentions = {frozenset(name[-1] for name in names if name.startswith(f"{part}.")) for part in ("attn", "cross")
                  if f"{part}.q" in table}  # fmt: skip
    held_at = {name: [held.path for held in installs if held.installed.site.name == name] for name in names}
    outside = bool(names - set(allowed))
    return {
        f"sites other than {', '.join(allowed)}": outside,
        "other matrices in cross-attention than in attention": len(attentions) > 1,
        "some layers of a site only": not outside and any(
            sorted(held_at[name]) != sorted(site.module for site in table[name]) for name in names
        ),
    }  # fmt: skip


def _flags(root: nn.Module, installs: Sequence[Held]) -> dict[str, Any]:
    names = {held.installed.site.name for held in installs}
    intermediate, output = _layers(root)
    matrices = sorted({name[-1] for name in names if name.split(".")[0] in ("attn", "cross")}, key="qkv".index)
    return {"attn_matrices": matrices or ["q", "v"], "selfattn_lora": bool(matrices), "intermediate_lora": intermediate in names,
            "output_lora": output in names}  # fmt: skip


def _by_module(root: nn.Module, installs: Sequence[Held], of: Any) -> dict[str, Tensor]:
    """One tensor for each module; slices of a fused projection one after another, in the order q, k, v."""
    by_path: dict[str, list[Held]] = defaultdict(list)
    for held in installs:
        by_path[held.path].append(held)
    found = {}
    for path, own in by_path.items():
        own.sort(key=lambda held: "qkv".find(held.installed.site.name[-1]))
        found[path] = of(own[0]) if len(own) == 1 else torch.cat([of(held) for held in own])
    return found
