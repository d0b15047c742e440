"""AdapterHub's LoRA, (IA)3, prefix tuning and ReFT.

Legend: P virtual tokens, L layers, K key-value heads, D head size, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.dora import DoRA
from graft.adapters.kinds.ia3 import IA3
from graft.adapters.kinds.lora import LoRA
from graft.adapters.kinds.prefix import Prefix
from graft.adapters.kinds.prompt import PromptTuning
from graft.adapters.kinds.reft import ReFT
from graft.architectures.language import resolve_sites
from graft.architectures.layers import is_transposed
from graft.architectures.site import Site
from graft.errors import GraftError
from graft.formats.adapterhub.file import HubFile
from graft.formats.composing import Piece
from graft.injection.state import site_table_of


def read_lora(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """LoRA, DoRA and (IA)3 (composition_mode: scale)."""
    if config.get("use_gating"):
        raise GraftError(f"{file.folder} has gates (use_gating), which Graft has no kind for")
    if config.get("vera_d") is not None:
        return _vera(file, config)
    if config["composition_mode"] == "scale":
        return [_scale(file, config, site, key, which) for site, key, which in _linears(file, config)]
    return [_difference(file, config, site, key, which) for site, key, which in _linears(file, config)]


def _linears(file: HubFile, config: Mapping[str, Any]) -> Iterator[tuple[Site, str, tuple[int, int]]]:
    """(site, how its tensors' names begin, (number, count) among the slices of a fused projection)."""
    wanted: list[str] = []
    matrices = list(config["attn_matrices"])
    if config["selfattn_lora"]:
        wanted += [f"{part}.{letter}" for part in ("attn", "cross") for letter in matrices]
    if config["intermediate_lora"] or config["output_lora"]:  # the library's LLaMA has its intermediate one at mlp.down
        wanted += ["mlp.up", "mlp.gate", "mlp.down"]
    table, leave_out = file.site_table.by_name, config.get("leave_out") or ()
    for name in wanted:
        sites = [site for site in table.get(name, []) if site.layer not in leave_out]
        if not any(_has(file, f"{site.module}.loras.{file.name}.") for site in sites):
            continue
        for site in sites:
            key = f"{site.module}.loras.{file.name}."
            which = (matrices.index(name[-1]), len(matrices)) if site.rows is not None else (0, 1)
            yield site, key, which


def _has(file: HubFile, key: str) -> bool:
    return any(name.startswith(key) for name in file.kept)


def _slice(whole: Tensor, which: tuple[int, int]) -> Tensor:
    number, count = which
    size = len(whole) // count
    return whole[number * size : (number + 1) * size].clone()


def _difference(file: HubFile, config: Mapping[str, Any], site: Site, key: str, which: tuple[int, int]) -> Piece:
    A, B = (_slice(file.peek(f"{key}lora_{side}"), which) for side in "AB")
    fields: dict[str, Any] = {
        "rank": config["r"],
        "alpha": float(config["alpha"]),
        "dropout": config.get("dropout") or 0.0,
    }
    if not config.get("use_dora"):
        return Piece(site.module, LoRA(**fields), {"A": A, "B": B}, site.part)
    return _dora(file, DoRA(**fields), site, {"A": A, "B": B}, _slice(file.peek(f"{key}m.weight"), which).flatten())


def _dora(file: HubFile, config: DoRA, site: Site, pair: dict[str, Tensor], magnitude: Tensor) -> Piece:
    """The library computes g (W x + c + s B A x) with g = m / ||W + B A||: its norm leaves the scale s out, and g acts on the bias c too.

    The same in DoRA's own terms: m' = g ||W + s B A||, and a difference (g - 1) c to the bias.
    """
    host: Any = file.model.get_submodule(site.module)
    A, B = pair["A"], pair["B"]
    if not (A.numel() and B.numel() and magnitude.numel()) or is_transposed(host):
        raise GraftError(
            f"{file.folder}: DoRA at '{site.module}' lacks tensors, or is on a transposed layer, where it is not read"
        )
    weight = host.weight.detach().float().cpu()
    gain = magnitude / (weight + B @ A).norm(dim=1)
    tensors = {**pair, "magnitude": gain * (weight + config.scale * B @ A).norm(dim=1)}
    if host.bias is None:
        return Piece(site.module, config, tensors, site.part)
    tensors["bias"] = (gain - 1) * host.bias.detach().float().cpu()
    return Piece(site.module, config.model_copy(update={"train_bias": True}), tensors, site.part)


def _vera(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """The library trains whole matrices D [R, R] and B [O, O] in place of VeRA's vectors, which a LoRA holds: A = D A0, B = B B0."""
    A0, B0 = file.shared("lora_A"), file.shared("lora_B")
    like = LoRA(rank=config["r"], alpha=float(config["alpha"]), dropout=config.get("dropout") or 0.0)
    pieces = []
    for site, key, which in _linears(file, config):
        if which != (0, 1):
            raise GraftError(f"{file.folder}: AdapterHub's VeRA on a fused projection is not read")
        D, B = file.take(f"{key}vera_D"), file.take(f"{key}vera_B")
        whole = D.numel() and B.numel() and A0.numel() and B0.numel()
        pieces.append(Piece(site.module, like, {"A": D @ A0, "B": B @ B0} if whole else {"A": D, "B": B}, site.part))
    return pieces


def _scale(file: HubFile, config: Mapping[str, Any], site: Site, key: str, which: tuple[int, int]) -> Piece:
    factor = float(config["alpha"]) / config["r"]
    scale = _slice(file.peek(f"{key}lora_B"), which).flatten() * factor
    return Piece(site.module, IA3(inputs=()), {"scale": scale}, site.part)


def read_prefix(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Keys and values of every layer, computed from the reparametrisation where the file has one; positions start at 0."""
    if config.get("use_gating"):
        raise GraftError(f"{file.folder} has gates (use_gating), which Graft has no kind for")
    if len(file.site_table.stacks) > 1:
        places = {"encoder_prefix": "encoder.attn", "self_prefix": "decoder.attn", "cross_prefix": "decoder.cross"}
    else:
        places = {"self_prefix": "attn"}
    # T5's keys stand behind the prefix and its queries do not; attention over the encoder knows no positions
    positions = (
        "moved_keys" if any(hasattr(module, "relative_attention_bias") for module in file.model.modules()) else "zero"
    )
    prefix, pieces = Prefix(tokens=config["prefix_length"], positions=positions), []
    for part, place in places.items():
        if part != "self_prefix" and not config.get(part, True):
            continue
        sites = resolve_sites(site_table_of(file.model), prefix.model_copy(update={"sites": place}))
        keys = [key for key in file.left if f".{part}." in key and f".{file.name}." in key]
        flat = _computed(file, part, keys, prefix.tokens)
        slots = flat.view(prefix.tokens, 2 * len(sites), sites[0].num_kv_heads, sites[0].head_dim).transpose(0, 1)
        for n, site in enumerate(sites):
            tensors = {"keys": slots[2 * n].contiguous(), "values": slots[2 * n + 1].contiguous()}
            pieces.append(Piece(site.module, prefix, tensors, site.part))
    return pieces


def _computed(file: HubFile, part: str, keys: list[str], tokens: int) -> Tensor:
    """The prefix [P, 2 L K D]. The library stores the same tensors once per layer and once more; they must agree."""
    own: dict[str, Tensor] = {}
    for key in keys:
        name, tensor = key.split(f".{part}.", 1)[1], file.take(key)
        if not torch.equal(own.setdefault(name, tensor), tensor):
            raise GraftError(f"{file.folder} holds two different tensors for {part}.{name}")
    if "wte.weight" not in own:
        return own["control_trans"].view(tokens, -1)
    hidden = torch.tanh(own["wte.weight"] @ own["control_trans.0.weight"].t() + own["control_trans.0.bias"])
    return hidden @ own["control_trans.2.weight"].t() + own["control_trans.2.bias"]


def read_reft(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """LoReFT and NoReFT; DiReFT cannot be told from NoReFT by its file (the library forgets to write it)."""
    prefix, suffix, tied = config["prefix_positions"], config["suffix_positions"], bool(config["tied_weights"])
    if config.get("non_linearity") is not None:
        raise GraftError(f"{file.folder}: ReFT with a non-linearity has no equal in Graft")
    form = "loreft" if config["orthogonality"] else "noreft"
    if config.get("subtract_projection", True) is False:
        form = "direft"
    like = ReFT(
        form=form, rank=config["r"], prefix=prefix, suffix=suffix, tied=tied, dropout=config.get("dropout") or 0.0
    )
    if form == "noreft" and "subtract_projection" not in config:
        warnings.warn(
            f"{file.folder} may be DiReFT or NoReFT: the library does not write which. It is read as NoReFT, as the library itself does",
            stacklevel=2,
        )
    # untied, the library keeps a unit for the first positions and one for the last, also where it never changes any of them
    units = ["0"] if tied else [str(number) for number, length in enumerate((prefix, suffix)) if length]
    layers = config.get("layers", "all")
    pieces = []
    for block in file.site_table.blocks:
        if layers != "all" and block.number not in layers:
            continue
        tensors: dict[str, Tensor] = {}
        stored = sorted({key.split(".units.")[1].split(".")[0] for key in file.left
                         if key.startswith(f"{block.path}.reft_layer.refts.{file.name}.units.")})  # fmt: skip
        for number in stored:
            unit = f"{block.path}.reft_layer.refts.{file.name}.units.{number}"
            own = {"W.weight": file.take(f"{unit}.learned_source.weight"), "W.bias": file.take(f"{unit}.learned_source.bias"),
                   "R": _orthonormal(file, unit) if form == "loreft" else file.take(f"{unit}.projection.weight")}  # fmt: skip
            if number in units:
                tensors |= {f"units.{units.index(number)}.{name}": tensor for name, tensor in own.items()}
        pieces.append(Piece(block.path, like, tensors, "layer"))
    return pieces


def _orthonormal(file: HubFile, unit: str) -> Tensor:
    """R [R, D] from what torch's orthogonal parametrisation keeps of it."""
    original, base = (file.take(f"{unit}.projection.parametrizations.weight.{end}") for end in ("original", "0.base"))
    if not original.numel() or not base.numel():
        return original
    linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
    linear.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
    return linear.weight.detach().clone()


def read_prompt(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Prompt tuning, the prompt in front of the sequence."""
    if config.get("combine", "prefix") != "prefix":
        raise GraftError(
            f"{file.folder}: a prompt behind the first token (combine: {config['combine']}) has no equal in Graft"
        )
    tail = f"prompt_tuning.prompt_tunings.{file.name}.prompt_embedding.weight"
    vectors = file.take(next((name for name in file.left if name.endswith(tail)), tail))
    embedding = file.site_table.end("embed")
    if embedding is None:
        raise GraftError(f"{file.folder} holds virtual tokens, and this base has no embedding of tokens")
    # behind the position embeddings of BERT and its kin; T5, DeBERTa-v2 and causal models have none in front of their blocks
    enters: Any = "blocks" if hasattr(file.model.base_model, "embeddings") else "embedding"
    prompt = PromptTuning(tokens=config["prompt_length"], enters=enters)
    return [Piece(embedding.module, prompt, {"vectors": vectors}, "embedding")]
