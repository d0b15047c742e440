"""The table of adapters and sites that `graft.summary` and `graft check` print."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from graft.architectures.blocks import stack_of
from graft.architectures.four_bit import parameters_in
from graft.architectures.walk import base_parameters
from graft.attaching.parameters import names, parameters
from graft.injection.state import site_table_of, state_of, unwrapped


@dataclass(frozen=True)
class SummaryRow:
    """One adapter at the sites of one name."""

    adapter: str
    kind: str
    site: str
    modules: int
    example: str
    parameters: int
    without: tuple[int, ...] = ()
    """The layers of this model that have no such site."""


@dataclass(frozen=True)
class Summary:
    """All adapters of a model. `str()` is a table."""

    rows: tuple[SummaryRow, ...]
    active: tuple[str, ...]
    adapter_parameters: dict[str, int]
    base_parameters: int

    def __str__(self) -> str:
        header = ("adapter", "kind", "site", "modules", "first module", "parameters")
        cells = [(r.adapter, r.kind, r.site, str(r.modules), r.example, f"{r.parameters:,}") for r in self.rows]
        widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *cells)
        ]
        for r in self.rows:
            if r.without:
                lines.append(f"{r.adapter}: no {r.site} in layer{'s' * (len(r.without) > 1)} {spans(r.without)}")
        for name, count in self.adapter_parameters.items():
            share = 100 * count / self.base_parameters if self.base_parameters else 0.0
            mark = " (active)" if name in self.active else ""
            lines.append(f"{name}{mark}: {count:,} parameters, {share:.4f} % of the base's {self.base_parameters:,}")
        return "\n".join(lines)


def spans(layers: Sequence[int]) -> str:
    """Return layer numbers in the way of the site language: 0, 1, 2 and 5 are "0-2,5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def summary(model: nn.Module) -> Summary:
    """Return the adapters of a model with their kinds, sites and numbers of parameters."""
    root = unwrapped(model)
    base = sum(parameters_in(p) for _, p in base_parameters(root))
    if not names(model):
        return Summary((), (), {}, base)
    state = state_of(model)
    rows = []
    for name in names(model):
        groups: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
        for installed in state.adapter(name).installs:
            count = sum(p.numel() for p in installed.module.parameters())
            groups[installed.config.kind, installed.site.name].append((installed.site.module, count))
        for (kind, site), found in groups.items():
            without = _layers_without(model, site, found[0][0])
            rows.append(
                SummaryRow(name, kind, site, len(found), found[0][0], sum(count for _, count in found), without)
            )
    totals = {name: sum(p.numel() for _, p in parameters(model, name)) for name in names(model)}
    return Summary(tuple(rows), tuple(sorted(state.current.names)), totals, base)


def _layers_without(model: nn.Module, site: str, example: str) -> tuple[int, ...]:
    """Return the layers of a module's stack that lack a site with a name: some layers of a hybrid have no attention, for example."""
    table, stack = site_table_of(model), stack_of(example)
    found = [*table.by_name.get(site, ()), *table.attentions.get(site, ())]
    has = {each.layer for each in found if stack_of(each.module) == stack}
    known = stack in table.depths and bool(has - {None})
    return tuple(layer for layer in range(table.depths[stack]) if layer not in has) if known else ()


def sites(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return every site name of this model, with the paths of the modules that it means."""
    table = site_table_of(model).by_name
    return {name: tuple(site.module for site in found) for name, found in table.items()}
