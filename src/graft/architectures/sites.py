"""The sites of one model by name: of its blocks, embeddings, norms and heads. `language.py` explains the names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from torch import nn

from graft.architectures.blocks import TOWERS, Block, blocks_of, stack_of, text_config_of
from graft.architectures.experts import expert_parts, expert_sizes
from graft.architectures.family import fused_features
from graft.architectures.layers import CONVOLUTIONS, is_linear, is_norm, learning, widths
from graft.architectures.site import Site, SiteRequest, SiteType
from graft.architectures.sizes import head_sizes, hidden_width, latent_sizes, sublayer_widths
from graft.architectures.source import bypassed
from graft.architectures.two_streams import STREAM, place_of
from graft.architectures.walk import base_modules
from graft.errors import GraftError


class SiteTable:
    """The sites of one model by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._read_from = _state_of_modules(model)
        self.text_config = text_config_of(model)
        self.blocks = blocks_of(model)
        self.stacks = frozenset(block.stack for block in self.blocks)
        towers = frozenset(TOWERS.values())
        self.towers = self.stacks & towers if self.stacks - towers else frozenset()
        """The stacks for images and sound beside a language model. Only names that begin with such a stack mean sites in it."""

    def fits(self) -> bool:
        """Whether the model still has the modules that the table was made from, and other code has hooked none of them since."""
        return _state_of_modules(self.model) == self._read_from

    @cached_property
    def by_name(self) -> dict[str, list[Site]]:
        """Return every site name of this model, with its sites."""
        table: dict[str, list[Site]] = {}
        for block in self.blocks:
            for site in self.of_block(block):
                table.setdefault(self._called(site.name, site), []).append(site)
        rest = {"linear": self.linears(), "norm": self.norms(), "bias": self.biased()} if self.blocks else {}
        rest |= {"embed": filter(None, [self.end("embed")]), "head": self.heads()}
        for name, sites in rest.items():
            for site in sites:
                table.setdefault(self._called(name, site), []).append(site)
        return table

    def _called(self, name: str, site: Site) -> str:
        """Return a site's name, with the tower before it if the site is in one: `vision.attn.q`."""
        stack = stack_of(site.module)
        return f"{stack}.{name}" if stack in self.towers else name

    def names(self) -> frozenset[str]:
        """Return every site name of this model."""
        return frozenset(self.by_name)

    def listing(self) -> str:
        """Return a sentence for error messages that lists the site names and the layers."""
        names = " ".join(sorted(self.names()))
        if not self.blocks:
            return f"No transformer blocks were recognised in this model ({names or 'no other sites'}); name modules by re:PATTERN."
        counts = [f"{stack} layers 0 to {count - 1}".strip() for stack, count in self.depths.items()]
        return f"This model has: {names} ({', '.join(counts)}); or re:PATTERN over module names."

    @cached_property
    def depths(self) -> dict[str, int]:
        """Return the number of layers of each stack."""
        return {stack: 1 + max(b.number for b in self.blocks if b.stack == stack) for stack in sorted(self.stacks)}

    def experts(self, block: Block) -> Iterator[Site]:
        """Yield the weights of a block's experts, part by part."""
        for relative, module in base_modules(block.module):
            for part in expert_parts(module):
                count, wide, high, _ = expert_sizes(module, part, hidden_width(block))
                yield Site(
                    f"experts.{part}", "experts", block.at(relative), part, wide, high, block.number, num_experts=count
                )

    def not_adapted(self, config: SiteRequest | None = None) -> list[str]:
        """Return the three-dimensional parameters in the blocks that a kind does not adapt (convolutions do not count)."""
        adapted = config is not None and "experts" in config.takes
        return [name for name, of_experts in self._three_dimensional if not (adapted and of_experts)]

    @cached_property
    def _three_dimensional(self) -> list[tuple[str, bool]]:
        """Return (name, whether it is a weight of experts) of each three-dimensional parameter in the blocks."""
        return [
            (f"{block.at(path)}.{name}".removesuffix("."), bool(expert_parts(module)))
            for block in self.blocks
            for path, module in base_modules(block.module)
            if not isinstance(module, CONVOLUTIONS)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        ]

    @cached_property
    def attentions(self) -> dict[str, list[Site]]:
        """Return the attention modules by name, for the kinds that act inside them."""
        found: dict[str, list[Site]] = {}
        for block in self.blocks:
            for name in block.family.attentions:
                site = self._attention(block, name)
                found.setdefault(self._called(name, site), []).append(site)
        return found

    def layer_of(self, path: str) -> int | None:
        """Return the number of the block that a module is in, None outside of blocks."""
        return next((block.number for block in self.blocks if path.startswith(f"{block.path}.")), None)

    def of_block(self, block: Block) -> Iterator[Site]:
        """Yield the sites of one block that have names of their own."""
        family = block.family
        for name, relative in family.linears.items():
            site = self.whole(name, block.at(relative), block.module.get_submodule(relative), block.number)
            yield site
            if name == "attn.qkv" and family.fused != "none":
                yield from self._fused_parts(block, site)
        for name, sublayer in family.sublayers.items():
            yield Site(name, "sublayer", block.at(sublayer.out), name, *sublayer_widths(block, name), block.number,
                       source=block.at(sublayer.source), residual=block.at(sublayer.residual) if sublayer.residual else None,
                       norm=block.at(sublayer.norm) if sublayer.post else None)  # fmt: skip
            if sublayer.norm and is_norm(norm := block.module.get_submodule(sublayer.norm)):
                yield self.whole(f"norm.{name}", block.at(sublayer.norm), norm, block.number)
        yield from self.experts(block)
        hidden, place = hidden_width(block), place_of(block.module)
        if place is None or place.runs_whole_blocks:
            yield Site("layer", "sublayer", block.path, "layer", hidden, hidden, block.number, source=block.path)
        if place is not None and place.runs_whole_blocks:
            yield Site(STREAM, "stream", block.at(STREAM), STREAM, hidden, hidden, block.number)

    def _fused_parts(self, block: Block, whole: Site) -> Iterator[Site]:
        heads, kv_heads, head_dim = head_sizes(block, "attn", self.text_config)
        for name, features in fused_features(block.family.fused, heads, kv_heads, head_dim, whole.out_features).items():
            size = features.stop - features.start if isinstance(features, slice) else len(features)
            yield replace(whole, name=name, part=name.removeprefix("attn."), out_features=size, features=features)

    def linears(self) -> Iterator[Site]:
        """Yield every linear layer of the blocks that the model calls and learns through.

        If the model only reads the weight, an adapter would have no effect; in an indexer it would get no gradient.
        """
        for block in self.blocks:
            named = {block.at(relative): name for name, relative in block.family.linears.items()}
            for relative, module in learning(base_modules(block.module)):
                parent, _, last = relative.rpartition(".")
                if is_linear(module) and not bypassed(block.module.get_submodule(parent), last):
                    path = block.at(relative)
                    yield self.whole(named.get(path, "linear"), path, module, block.number)

    def norms(self) -> Iterator[Site]:
        """Yield every norm of the model, in the blocks and outside, but not those of indexers."""
        for path, module in learning(base_modules(self.model)):
            if is_norm(module):
                yield self.whole("norm", path, module, self.layer_of(path))

    def biased(self) -> Iterator[Site]:
        """Yield every linear layer and norm with a bias, but not those of indexers."""
        for path, module in learning(base_modules(self.model)):
            if (is_linear(module) or is_norm(module)) and module._parameters.get("bias") is not None:
                yield self.whole("bias", path, module, self.layer_of(path))

    def _attention(self, block: Block, name: str) -> Site:
        heads, kv_heads, head_dim = head_sizes(block, name, self.text_config)
        width, latent = (
            sublayer_widths(block, name),
            latent_sizes(self.model.get_submodule(block.at(block.family.attentions[name]))),
        )
        value_dim = head_dim if latent is None else latent[2]
        return Site(name, "attention", block.at(block.family.attentions[name]), "prefix", *width, block.number,
                    num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)  # fmt: skip

    def end(self, name: str) -> Site | None:
        """Return the input embedding ("embed") or the output head ("head"), None if the model has none that fits."""
        getter = getattr(self.model, "get_input_embeddings" if name == "embed" else "get_output_embeddings", None)
        try:
            module = getter() if getter is not None else None
        except NotImplementedError:
            module = None
        if module is None or not (isinstance(module, nn.Embedding) if name == "embed" else is_linear(module)):
            return None  # ViT's embeddings are patches; MusicGen has a list of heads
        path = next((path for path, other in base_modules(self.model) if other is module), None)
        return None if path is None else self.whole(name, path, module, None)

    def heads(self) -> Iterator[Site]:
        """Yield the output head: that of the language model, or the linear layers of a classifier after its base model."""
        head = self.end("head")
        inner = getattr(self.model, getattr(self.model, "base_model_prefix", "") or "-", None)
        if head is not None:
            yield head
        elif isinstance(inner, nn.Module):
            inside = set(inner.modules())
            for path, module in base_modules(self.model):
                if module not in inside and is_linear(module):
                    yield self.whole("head", path, module, None)

    def tables(self) -> list[Site]:
        """Return the input embeddings that are called. T5 and BART list one table as `shared` and call modules tied to it."""
        listed = self.end("embed")
        if listed is None or not listed.module.endswith("shared"):
            return [] if listed is None else [listed]
        weight = self.model.get_submodule(listed.module).weight
        found = [path for path, module in base_modules(self.model)
                 if isinstance(module, nn.Embedding) and module.weight is weight and path != listed.module]  # fmt: skip
        return [replace(listed, module=path) for path in found] or [listed]

    def whole(self, name: str, path: str, module: nn.Module, layer: int | None) -> Site:
        """Return the site that is a whole module. Raises `GraftError` for a list of modules, which has no forward to adapt."""
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise GraftError(
                f"'{path}' is a chain or list of modules, which cannot have an adapter: name a module inside it"
            )
        kind: SiteType = "linear" if is_linear(module) else "embedding" if isinstance(module, nn.Embedding) else "other"
        kind = "norm" if is_norm(module) else kind
        return Site(name, kind, path, kind, *widths(module, path), layer)


def _state_of_modules(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return each module of the base (modules are compared by identity), and whether its instance has a forward of its own."""
    return [(module, "forward" in module.__dict__) for _, module in base_modules(model)]
