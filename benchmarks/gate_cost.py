"""What a gate costs over the adapter in it: training steps and forward passes, side by side in one run.

    python benchmarks/gate_cost.py [--repeats 15] [--rows 8] [--length 128] [--tiny]

Timed is processor time on one thread, float32. The causal base is the embedded one, with gates per token. The encoder is a random BERT of
4 layers and width 256, with gates per row. Passes with and without the gate take turns; reported are medians in milliseconds and the
ratio gated / plain.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification
from turns import keep, machine, pass_options, processor_milliseconds

import graft
from graft.config import BaseConfig

QV = "attn.q attn.v"
CAUSAL = {
    "lora linear": {"kind": "lora", "rank": 8, "sites": "linear"},
    "lora q v": {"kind": "lora", "rank": 8, "sites": QV},
    "series": {"kind": "series", "bottleneck": 32, "sites": "mlp"},
    "parallel": {"kind": "parallel", "bottleneck": 32, "sites": "mlp"},
    "ia3": {"kind": "ia3"},
}
ENCODER = {
    "lora q v": {"kind": "lora", "rank": 8, "sites": QV},
    "series stream": {"kind": "series", "bottleneck": 32, "reads": "stream", "sites": "mlp"},
    "prefix": {"kind": "prefix", "tokens": 10},
}


def causal() -> Any:
    """The embedded base."""
    from graft.bases import load_base

    return load_base(BaseConfig(model="seedling", dtype="float32", device="cpu")).model


def encoder() -> Any:
    """A random BERT with a head of two classes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=1000, **sizes))


def measured(model: Any, of: dict[str, Any], gate: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a step (forward and backward) and of a forward pass, plain and gated, and the ratios."""
    graft.attach(model, {"plain": of, "gated": {"kind": "gate", "of": of, **gate}})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (args.rows, args.length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prepare(way: str) -> None:
        what, name = way.split()
        model.zero_grad()
        graft.set_active(model, name)
        model.train(what == "step")

    def step() -> None:
        model(**inputs).logits.square().mean().backward()

    passes = {"step": step, "forward": torch.no_grad()(lambda: model(**inputs))}
    ways = {f"{what} {name}": passes[what] for name in ("plain", "gated") for what in passes}
    found = processor_milliseconds(ways, args.repeats, warm=2, before=prepare)
    graft.detach(model)
    ratios = {f"{what} gated / plain": found[f"{what} gated"] / found[f"{what} plain"] for what in ("step", "forward")}
    return {**found, **ratios}


def main() -> None:
    args = pass_options(__doc__, "gate_cost.json")
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for base, make, kinds, gate in (
        ("seedling, per token", causal, CAUSAL, {"per": "token"}),
        ("BERT of 4 layers, per row", encoder, ENCODER, {"per": "row"}),
    ):
        model = make()
        for name, of in kinds.items():
            own = {**gate, "reads": "output"} if of["kind"] == "series" else gate
            found.setdefault(base, {})[name] = measured(model, of, own, args)
            print(base, name, {key: round(value, 2) for key, value in found[base][name].items()}, flush=True)
    keep({"machine": machine(1), "rows": args.rows, "length": args.length, "milliseconds": found}, args.out)


if __name__ == "__main__":
    main()
