"""The site language: names that mean the same places in every architecture.

    attn.q attn.k attn.v attn.qkv attn.o mlp.gate mlp.up mlp.down     linear layers of the blocks
    cross.q cross.k cross.v cross.o                                   the same of cross-attention (over the encoder)
    experts.gate_up experts.up experts.down                           weights of experts stored as three-dimensional parameters
    attn cross mlp layer                                              sublayers (attention kinds: the attention module)
    stream                                                            the other stream of a block, on a reversible base
    linear                                                            every linear layer of the blocks, and their experts for LoRA
    norm.attn norm.cross norm.mlp                                     the norm of each sublayer
    norm bias                                                         every norm; every linear layer and norm with a bias
    embed head                                                        input embedding; output head (of a classifier, its linear layers)
    attn.q@0-15   mlp@3,7-9   layer@last4                             a range of layers after any of them
    cross.k?                                                          only if the model has it
    encoder.attn   decoder.mlp@0-3   vision.linear                    one stack of a model with several
    re:PATTERN                                                        modules with a full name that matches a regular expression

Layers are numbered from 0 in each stack: in an encoder-decoder `attn@0` is the first layer of both, and `decoder.attn@0` that of one.
Towers for images and sound beside a language model (vision, audio) get adapters only if they are named.
A name that matches nothing is an error that lists what exists.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from graft.architectures.blocks import layers_in, stack_of
from graft.architectures.site import Site, SiteRequest
from graft.architectures.sites import SiteTable
from graft.architectures.two_streams import STREAM
from graft.architectures.walk import base_modules
from graft.errors import GraftError, did_you_mean
from graft.utils.patterns import pattern


def resolve_sites(site_table: SiteTable, config: SiteRequest) -> list[Site]:
    """Return the sites that an adapter's `sites` names in a model, in the model's order, each once.

    Raises `GraftError` for a name that matches nothing, or has a type of site that the kind does not take.
    """
    wanted = (
        config.sites.split() if isinstance(config.sites, str) and not config.sites.startswith("re:") else config.sites
    )
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not names:
        raise GraftError(f"{config.kind}: no sites given. {site_table.listing()}")
    missed = site_table.not_adapted(config) if any(name.partition("@")[0] == "linear" for name in names) else []
    if missed:
        warnings.warn(
            f"kind '{config.kind}' at 'linear' does not adapt {len(missed)} weights (such as {missed[0]}) that this model stores as "
            "three-dimensional parameters, not as linear layers",
            stacklevel=2,
        )
    found: dict[tuple[str, str], Site] = {}
    for name in names:
        for site in _lookup(site_table, name, config):
            found.setdefault((site.module, site.part), site)
    if not found:
        raise GraftError(f"{config.kind}: this model has none of the sites '{' '.join(names)}'. {site_table.listing()}")
    return list(found.values())


def _lookup(site_table: SiteTable, name: str, config: SiteRequest) -> list[Site]:
    """Return the sites of one name, checked against what the kind takes. A name with a question mark may have none.

    E.g. `decoder.attn.q@0-3`: the stack is `decoder`, the name in it `attn.q`, and the span `0-3`.
    """
    optional = name.endswith("?") and not name.startswith("re:")
    name = name.removesuffix("?") if optional else name
    if name.startswith("re:"):
        sites = _by_pattern(site_table, name[3:])
    else:
        base, at, span = name.partition("@")
        stack, _, rest = base.partition(".")
        one = bool(stack) and stack in site_table.stacks  # the name begins with a stack
        chosen = {stack} if one else site_table.stacks - site_table.towers
        sites = _by_name(site_table, rest if one and stack not in site_table.towers else base, config)
        sites = [site for site in sites if not one or stack_of(site.module) == stack]
        if at and site_table.blocks:
            depths = {stack: depth for stack, depth in site_table.depths.items() if stack in chosen}
            layers = {stack: layers_in(span, depth, max(depths.values()), name) for stack, depth in depths.items()}
            sites = [site for site in sites if site.layer in layers.get(stack_of(site.module), ())]
    if not sites and name == "bias":
        raise GraftError(
            f"kind '{config.kind}' at 'bias': no linear layer and no norm of this model has a bias. {site_table.listing()}"
        )
    if not sites and not optional and name.partition("@")[0] == STREAM:
        raise GraftError(
            "site 'stream' is the other stream of a block on a reversible base of coupling meft1 or meft2, and this base has none: set "
            "base.reversible (in Python, graft.make_reversible), or name other sites"
        )
    if not sites and not optional:
        raise GraftError(
            f"site '{name}' matches nothing in this model.{did_you_mean(name, site_table.names())} {site_table.listing()}"
        )
    for site in sites:
        if site.type not in config.takes and not (site.type == "norm" and "other" in config.takes):
            hint = " Name its linear layers (attn.q, mlp.up, ...)." if site.type == "sublayer" else ""
            raise GraftError(
                f"kind '{config.kind}' takes {_listed(config.takes)} sites; '{name}' is a {site.type} site.{hint}"
            )
    return sites


def _by_name(site_table: SiteTable, name: str, config: SiteRequest) -> list[Site]:
    """Return the sites of a name without stack, span and question mark. What three names mean depends on the kind."""
    if name == "linear" and "experts" in config.takes:
        blocks = [block for block in site_table.blocks if block.stack not in site_table.towers]
        return [*site_table.by_name.get(name, []), *(site for block in blocks for site in site_table.experts(block))]
    if name.rpartition(".")[2] in ("attn", "cross") and "attention" in config.takes and "sublayer" not in config.takes:
        return site_table.attentions.get(name, [])
    if name == "embed" and config.takes != {"embedding"}:
        return site_table.tables()
    return site_table.by_name.get(name, [])


def _by_pattern(site_table: SiteTable, text: str) -> list[Site]:
    return [
        site_table.whole(f"re:{text}", path, module, site_table.layer_of(path))
        for path, module in base_modules(site_table.model)
        if pattern(text).fullmatch(path)
    ]


def _listed(names: Sequence[str] | frozenset[str]) -> str:
    return " or ".join(sorted(names))
