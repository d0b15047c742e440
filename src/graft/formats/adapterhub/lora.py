"""AdapterHub's LoRA, DoRA, (IA)3 and VeRA: one config for queries, keys and values of all attentions and for the MLP's layers.

On a fused projection the library adapts the chosen ones of q, k, v, and stacks their tensors in this order.

Legend: R rank, I input, O output features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.dora import DoRA
from graft.adapters.kinds.ia3 import IA3
from graft.adapters.kinds.lora import LoRA
from graft.adapters.surroundings import Surroundings
from graft.architectures.layers import is_transposed
from graft.architectures.site import Site
from graft.errors import GraftError
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.gates import gated
from graft.formats.adapterhub.places import REVERSED, differing, model_type, refuse
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.injection.state import site_table_of

COMMON: dict[str, Any] = {
    "architecture": "lora", "dtype": None, "init_weights_seed": None, "leave_out": [], "use_dora": False, "use_gating": False,
    "vera_b": None, "vera_d": None,
}  # fmt: skip
"""Fields of the config, with the values that mean "not used"."""


def read_lora(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Read LoRA, DoRA, VeRA, or (IA)3, which the library stores as a LoRA with `composition_mode: scale`."""
    if config.get("use_gating") and (config.get("vera_d") is not None or config.get("use_dora")):
        raise GraftError(f"{file.folder} has gates (use_gating) with DoRA or VeRA, which has no equal in Graft")
    if config.get("vera_d") is not None:
        return _read_vera(file, config)
    read = _read_scaling if config["composition_mode"] == "scale" else _read_update
    if not config.get("use_gating"):
        return [read(file, config, site, key, which) for site, key, which in _adapted_sites(file, config)]
    config = {**config, "alpha": config["r"]}  # the gate replaces alpha / r
    return [
        gated(file, read(file, config, site, key, which), f"{key}gate", slice(which[0], which[0] + 1))
        for site, key, which in _adapted_sites(file, config)
    ]


def _adapted_sites(file: HubFile, config: Mapping[str, Any]) -> Iterator[tuple[Site, str, tuple[int, int]]]:
    """Yield each site, the prefix of its tensors' names, and (number, count): its slice of a fused projection, else (0, 1).

    Notes for `finish` what the config promises and the file has nowhere.
    """
    matrices, leave_out = list(config["attn_matrices"]), config.get("leave_out") or ()
    table = {
        name: [site for site in sites if site.layer not in leave_out] for name, sites in file.site_table.by_name.items()
    }
    for group in _promised(file, config, matrices):
        sites = [site for name in group for site in table.get(name, [])]
        names = {site.name for site in sites if _has(file, f"{site.module}.loras.{file.name}.")}
        if sites and not names and not sites[0].name.startswith("cross."):
            file.note_missing(f"{sites[0].module}.loras.{file.name}.lora_B")
        for site in (site for site in sites if site.name in names):
            key = f"{site.module}.loras.{file.name}."
            which = (matrices.index(site.name[-1]), len(matrices)) if site.features is not None else (0, 1)
            yield site, key, which


def _promised(file: HubFile, config: Mapping[str, Any], matrices: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield groups of site names of which the file has at least one: the library adapts cross-attention, and gates, in some models only."""
    if config["selfattn_lora"]:
        yield from ((f"attn.{letter}",) for letter in matrices)
        yield from ((f"cross.{letter}",) for letter in matrices)
    into, out = ("mlp.up", "mlp.gate"), ("mlp.down",)
    reverse = getattr(file.model.config, "model_type", None) in REVERSED
    if config["intermediate_lora"]:
        yield out if reverse else into
    if config["output_lora"]:
        yield into if reverse else out


def _has(file: HubFile, key: str) -> bool:
    return any(name.startswith(key) for name in file.kept)


def _slice(whole: Tensor, which: tuple[int, int]) -> Tensor:
    """Return one of `count` equal slices: with q and v adapted, (1, 2) is the second half, which is v's."""
    number, count = which
    size = len(whole) // count
    return whole[number * size : (number + 1) * size].clone()


def _read_update(file: HubFile, config: Mapping[str, Any], site: Site, key: str, which: tuple[int, int]) -> Piece:
    """Read LoRA or DoRA at one site."""
    A, B = (_slice(file.peek(f"{key}lora_{side}"), which) for side in "AB")
    fields: dict[str, Any] = {
        "rank": config["r"],
        "alpha": float(config["alpha"]),
        "dropout": config.get("dropout") or 0.0,
    }
    if not config.get("use_dora"):
        return Piece(site.module, LoRA(**fields), {"A": A, "B": B}, site.part)
    magnitude = _slice(file.peek(f"{key}m.weight"), which).flatten()
    return _dora(file, DoRA(**fields), site, {"A": A, "B": B}, magnitude)


def _dora(file: HubFile, config: DoRA, site: Site, pair: dict[str, Tensor], magnitude: Tensor) -> Piece:
    """Translate the library's DoRA into the paper's, which Graft computes.

    The library computes g (W x + c + s B A x) with g = m / ||W + B A||: the norm lacks the scale s, and g multiplies the bias c too. The
    paper's form computes the same with the magnitude g ||W + s B A|| and an update (g - 1) c of the bias.
    """
    host: Any = file.model.get_submodule(site.module)
    A, B = pair["A"], pair["B"]
    if not (A.numel() and B.numel() and magnitude.numel()) or is_transposed(host):
        raise GraftError(
            f"{file.folder}: DoRA at '{site.module}' lacks tensors, or is on a transposed layer, where it cannot be read"
        )
    weight = Surroundings(host).weight().detach().float().cpu()
    gain = magnitude / (weight + B @ A).norm(dim=1)
    tensors = {**pair, "magnitude": gain * (weight + config.scale * B @ A).norm(dim=1)}
    if host.bias is None:
        return Piece(site.module, config, tensors, site.part)
    tensors["bias"] = (gain - 1) * host.bias.detach().float().cpu()
    return Piece(site.module, config.model_copy(update={"train_bias": True}), tensors, site.part)


def _read_vera(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Read VeRA as a LoRA: the library trains matrices D [R, R] and B [O, O] instead of VeRA's vectors, so A = D A0 and B = B B0."""
    A0, B0 = file.shared("lora_A"), file.shared("lora_B")
    like = LoRA(rank=config["r"], alpha=float(config["alpha"]), dropout=config.get("dropout") or 0.0)
    pieces = []
    for site, key, which in _adapted_sites(file, config):
        if which != (0, 1):
            raise GraftError(f"{file.folder}: AdapterHub's VeRA on a fused projection cannot be read")
        D, B = file.take(f"{key}vera_D"), file.take(f"{key}vera_B")
        whole = D.numel() and B.numel() and A0.numel() and B0.numel()
        pieces.append(Piece(site.module, like, {"A": D @ A0, "B": B @ B0} if whole else {"A": D, "B": B}, site.part))
    return pieces


def _read_scaling(file: HubFile, config: Mapping[str, Any], site: Site, key: str, which: tuple[int, int]) -> Piece:
    """Read (IA)3 at one site: factors on the output, which the library multiplies by alpha / r."""
    factor = float(config["alpha"]) / config["r"]
    scale = _slice(file.peek(f"{key}lora_B"), which).flatten() * factor
    return Piece(site.module, IA3(inputs=()), {"scale": scale}, site.part)


def write_lora(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write LoRA of one rank and alpha. Return its config."""
    config: Any = adapters[0].config
    refuse("LoRA", {
        "ranks or settings that differ between sites": differing(adapters),
        "alpha / sqrt(rank)": config.rslora, "biases": config.train_bias, **_wrong_sites(root, adapters),
    })  # fmt: skip
    for letter in "AB":
        tensors = _by_module(adapters, lambda adapter, letter=letter: getattr(adapter.module, letter))
        folder.tensors |= {f"{path}.loras.{name}.lora_{letter}": tensor for path, tensor in tensors.items()}
    return {**COMMON, **_flags(root, adapters), "r": config.rank,
            "alpha": config.alpha, "dropout": config.dropout, "composition_mode": "add",
            "init_weights": "lora"}  # fmt: skip


@torch.no_grad()
def write_dora(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write DoRA where the library's form (see `_dora`) computes the same: its gain multiplies the layer's bias too. Return its config."""
    config: Any = adapters[0].config
    refuse("DoRA", {
        "ranks or settings that differ between sites": differing(adapters), "alpha / sqrt(rank)": config.rslora,
        "slices of a fused projection or transposed layers": any(
            adapter.installed.site.features is not None or is_transposed(root.get_submodule(adapter.path)) for adapter in adapters
        ), **_wrong_sites(root, adapters),
    })  # fmt: skip
    for adapter in adapters:
        host, module = root.get_submodule(adapter.path), adapter.module
        weight, delta = Surroundings(host).weight().detach().float(), (module.B @ module.A).float()
        gain = module.magnitude / (weight + module.scale * delta).norm(dim=1)
        _refuse_bias(host, module, gain, adapter.path)
        prefix = f"{adapter.path}.loras.{name}."
        magnitude = gain * (weight + delta).norm(dim=1)
        folder.tensors |= {
            f"{prefix}lora_A": module.A,
            f"{prefix}lora_B": module.B,
            f"{prefix}m.weight": magnitude[:, None],
        }
    return {**COMMON, **_flags(root, adapters), "r": config.rank,
            "alpha": config.alpha, "dropout": config.dropout, "composition_mode": "add",
            "init_weights": "lora", "use_dora": True}  # fmt: skip


def _refuse_bias(host: Any, module: Any, gain: Tensor, path: str) -> None:
    """Raise `GraftError` unless the adapter changes the bias exactly as the library's gain would, up to rounding."""
    own = host.bias if host.bias is not None else torch.zeros(())
    learned = module.bias if module.bias is not None else torch.zeros(())
    wanted = (gain - 1) * own.float()
    if (learned - wanted).abs().max() > 1e-5 * wanted.abs().max().clamp(min=1.0):
        raise GraftError(
            f"AdapterHub's DoRA scales a layer's bias together with its weight. This one leaves the bias of '{path}' as it is, or learned "
            "another: keep Graft's format, or export to PEFT"
        )


def write_ia3(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write (IA)3 with factors on outputs. Return its config."""
    refuse("(IA)3", {
        "factors on the input of a layer (set inputs: [] and name the layer before it)": any(
            adapter.module.scale.numel() != adapter.installed.site.out_features or type(adapter.module).__name__ == "InputScaling"
            for adapter in adapters
        ), **_wrong_sites(root, adapters),
    })  # fmt: skip
    tensors = _by_module(adapters, lambda adapter: adapter.module.scale[:, None])
    folder.tensors |= {f"{path}.loras.{name}.lora_B": tensor for path, tensor in tensors.items()}
    return {
        **COMMON,
        **_flags(root, adapters),
        "r": 1,
        "alpha": 1,
        "dropout": 0.0,
        "composition_mode": "scale",
        "init_weights": "ia3",
    }


def _mlp_sites(root: nn.Module) -> tuple[str, str]:
    """Return the sites of the two layers that the library calls the intermediate and the output layer."""
    return ("mlp.down", "mlp.up") if model_type(root) in REVERSED else ("mlp.up", "mlp.down")


def _wrong_sites(root: nn.Module, adapters: Sequence[SiteAdapter]) -> dict[str, bool]:
    """Return the reasons, for `refuse`, why the config's few switches cannot name these sites."""
    names, table = {adapter.installed.site.name for adapter in adapters}, site_table_of(root).by_name
    letters = [f"{part}.{letter}" for part in ("attn", "cross") for letter in "qkv"]
    allowed = [name for name in (*letters, *_mlp_sites(root)) if name in table]
    attentions = {frozenset(name[-1] for name in names if name.startswith(f"{part}.")) for part in ("attn", "cross")
                  if f"{part}.q" in table}  # fmt: skip
    paths = {name: [adapter.path for adapter in adapters if adapter.installed.site.name == name] for name in names}
    outside = bool(names - set(allowed))
    return {
        f"sites other than {', '.join(allowed)}": outside,
        "other matrices in cross-attention than in attention": len(attentions) > 1,
        "some layers of a site only": not outside and any(
            sorted(paths[name]) != sorted(site.module for site in table[name]) for name in names
        ),
    }  # fmt: skip


def _flags(root: nn.Module, adapters: Sequence[SiteAdapter]) -> dict[str, Any]:
    """Return the switches that name the sites."""
    names = {adapter.installed.site.name for adapter in adapters}
    intermediate, output = _mlp_sites(root)
    matrices = sorted({name[-1] for name in names if name.split(".")[0] in ("attn", "cross")}, key="qkv".index)
    return {"attn_matrices": matrices or ["q", "v"], "selfattn_lora": bool(matrices), "intermediate_lora": intermediate in names,
            "output_lora": output in names}  # fmt: skip


def _by_module(adapters: Sequence[SiteAdapter], tensor: Callable[[SiteAdapter], Tensor]) -> dict[str, Tensor]:
    """Return one tensor per module. Slices of a fused projection are stacked in the order q, k, v."""
    by_path: dict[str, list[SiteAdapter]] = defaultdict(list)
    for adapter in adapters:
        by_path[adapter.path].append(adapter)
    found = {}
    for path, own in by_path.items():
        own.sort(key=lambda adapter: "qkv".find(adapter.installed.site.name[-1]))
        found[path] = tensor(own[0]) if len(own) == 1 else torch.cat([tensor(adapter) for adapter in own])
    return found
