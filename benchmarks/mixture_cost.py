"""What a mixture costs: AdaMix against the plain adapter that it becomes, per training step and after training.

    python benchmarks/mixture_cost.py [--steps 12] [--dtype float32] [--threads 1] [--tiny]

All ways train one adapter on the same random base and the same samples: `plain` a series adapter, `mixture` four experts of it in one pass,
`adamix` four experts with the objective consistency, which runs each sample twice in one batch. A step is everything that training does.
`evaluated` are forward passes without gradients: of the plain adapter, of the mixture as its mean, and of the saved adapter loaded again.
The ways take turns in one process; reported are the medians, and the median of each turn's ratio to the plain adapter. On a CPU the time is
that of the processor, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from random_base import add_options, make_base, parsed
from step_vs_floor import Step, timed, training_step
from turns import keep, machine

PLAIN: dict[str, Any] = {"kind": "series", "bottleneck": 48, "activation": "gelu", "init": "bert", "sites": "mlp.down"}
MIXTURE: dict[str, Any] = {"kind": "mixture", "of": PLAIN, "experts": 4, "share": "up"}
WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": (PLAIN, None),
    "mixture": (MIXTURE, None),
    "adamix": (MIXTURE, {"kind": "consistency", "weight": 100.0}),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, in one forward pass (AdaMix: two)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "mixture_cost.json"))
    return parsed(parser)


def evaluation(args: argparse.Namespace, model: Any, name: str) -> Step:
    """A forward pass of a batch without gradients."""
    import torch

    import graft

    ids = torch.randint(3, args.vocabulary, (args.batch, args.length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.eval()
        with torch.no_grad(), graft.use(model, name):
            model.model(input_ids=ids.to(model.device), use_cache=False)

    return step


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    import graft

    model = make_base(args)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for name, (adapter, _) in WAYS.items():
        graft.attach(model, {name: adapter})
    steps = {name: training_step(args, model, name, objective, passes=2) for name, (_, objective) in WAYS.items()}
    trained = timed(steps, args.steps, clock)
    with tempfile.TemporaryDirectory() as folder:
        graft.save(model, "adamix", Path(folder) / "adamix")
        graft.load(model, Path(folder) / "adamix", name="collapsed")
    evaluated = timed(
        {name: evaluation(args, model, name) for name in ("plain", "adamix", "collapsed")}, args.steps, clock
    )
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "repeats")},
        "tokens_per_step": args.batch * args.length,
        "parameters": graft.summary(model).adapter_parameters,
        "machine": machine(args.threads),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "step": summed_up(trained),
        "evaluated": summed_up(evaluated),
    }


def summed_up(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median seconds, and the median of each turn's ratio to the plain adapter."""
    ratios = {way: [own / other for own, other in zip(seconds[way], seconds["plain"], strict=True)] for way in seconds}
    return {
        way: {"seconds": round(statistics.median(seconds[way]), 4), "ratio": round(statistics.median(ratios[way]), 3)}
        for way in seconds
    }


def main() -> None:
    args = options()
    result = measure(args)
    keep(result, args.out)
    for what in ("step", "evaluated"):
        for way, found in result[what].items():
            print(f"{what:<10} {way:<10} {found['seconds']:8.3f} s   {found['ratio']:.2f}x plain")


if __name__ == "__main__":
    main()
