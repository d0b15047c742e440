"""What the low-rank parts of many jobs at one module cost: one after another, as grouped products, and as batched products.

    python benchmarks/grouped_lora.py [--jobs 8] [--ranks 16] [--tokens 400] [--dtype float32] [--threads 1] [--tiny]

Timed is what a training step does at one module beside the frozen layer: the terms added to the output, the gradients of all factors
and the terms' part of the input's gradient; `layer` is the frozen layer's own product and input gradient, to compare with. Every job has
equally many tokens, since a batched product knows no others. The grouped products are Graft's on every device, also where `has_kernel`
says that torch has no kernel for them and Graft itself takes the loop. The ways take turns in one process; reported are medians, the
median of each turn's ratio to the loop, how many operators of torch a way takes (views and empty tensors not counted), and how
far the ways' numbers lie apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from turns import WARM, keep, machine, synchronise

LOOP, GROUPED, BATCHED, LAYER = "loop", "grouped", "batched", "layer"
TINY = {"jobs": 3, "ranks": "2,4", "tokens": 5, "features": "16,24", "steps": 4, "threads": 1}


class Operators(TorchDispatchMode):
    """Counts what is computed."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or "empty" in function.__name__)
        return function(*args, **(kwargs or {}))

    @classmethod
    def of(cls, step: Callable[..., Any], out: Any, dx: Any) -> int:
        with cls() as counted:
            step(out, dx)
        return counted.count


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--ranks", default="16", help="of the jobs in turn, separated by commas")
    parser.add_argument("--tokens", type=int, default=400, help="of each job in a step")
    parser.add_argument("--features", default="2048,2048", help="of the layer: in,out")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script runs")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "grouped_lora.json"))
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    return args


def made(args: argparse.Namespace) -> tuple[Any, ...]:
    """Terms, input, output gradient and the frozen weight."""
    from graft.ops.low_rank_update import LowRankUpdate
    from graft.routing.context import AdapterContext

    like = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": getattr(torch, args.dtype)}
    num_in, num_out = map(int, args.features.split(","))
    ranks = [int(rank) for rank in args.ranks.split(",")]
    torch.manual_seed(0)
    terms, ctx = [], AdapterContext((args.tokens,), flat=True)
    for job in range(args.jobs):
        rank, rows = ranks[job % len(ranks)], slice(job * args.tokens, (job + 1) * args.tokens)
        A, B = (torch.randn(*shape, device=like["device"]) for shape in ((rank, num_in), (num_out, rank)))
        terms.append(LowRankUpdate(A, B, 1.5, 0.0, 0, ctx, rows))
    x, grad = (torch.randn(1, args.jobs * args.tokens, size, **like) for size in (num_in, num_out))
    return terms, x, grad, torch.randn(num_out, num_in, **like)


def one_node(terms: Any, x: Any, grad: Any, out: Any, dx: Any, kernel: bool) -> list[Any]:
    """A step as Graft computes it, by grouped products or by the loop."""
    from graft.ops import low_rank as fused
    from graft.ops import low_rank_grouped as grouped

    grouped.has_kernel = lambda x: kernel
    lows, factors = fused.add_terms_(out, x, terms), fused.factors_of(terms)
    return fused.factor_gradients(terms, grad, x, [*lows, *factors], [True] * len(factors), dx, fresh=False)


def batched(terms: Any, x: Any, grad: Any, out: Any, dx: Any) -> list[Any]:
    """A step by batched products, J jobs of N tokens each."""
    from graft.ops.low_rank_grouped import stacks

    def by_job(tensor: Any) -> Any:
        return tensor.view(len(terms), -1, tensor.shape[-1])

    def stacked() -> tuple[Any, Any]:
        return stacks([term.A for term in terms], [term.B for term in terms], terms, x.dtype)

    A_JRI, B_JOR = stacked()
    low_JNR = torch.bmm(by_job(x), A_JRI.mT)
    by_job(out).baddbmm_(low_JNR, B_JOR.mT)
    A_JRI, B_JOR = stacked()  # of the backward pass, which keeps none
    low_grad_JNR = torch.bmm(by_job(grad), B_JOR)
    dA_JRI, dB_JOR = torch.bmm(low_grad_JNR.mT, by_job(x)).float(), torch.bmm(by_job(grad).mT, low_JNR).float()
    by_job(dx).baddbmm_(low_grad_JNR, A_JRI)
    gradients = []
    for term, dA_RI, dB_OR in zip(terms, dA_JRI, dB_JOR, strict=True):
        rank = len(term.A)
        gradients += [dA_RI[:rank] * term.scale, dB_OR[:, :rank]]
    return gradients


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from graft.ops.low_rank_grouped import has_kernel

    if args.threads:
        torch.set_num_threads(args.threads)
    (terms, x, grad, weight), kernel = made(args), has_kernel
    there = kernel(x)
    out, dx = torch.zeros_like(grad), torch.zeros_like(x)
    ways: dict[str, Callable[..., Any]] = {
        LOOP: lambda out, dx: one_node(terms, x, grad, out, dx, kernel=False),
        GROUPED: lambda out, dx: one_node(terms, x, grad, out, dx, kernel=True),
        BATCHED: lambda out, dx: batched(terms, x, grad, out, dx),
        LAYER: lambda out, dx: (torch.mm(x[0], weight.t(), out=out[0]), torch.mm(grad[0], weight, out=dx[0])),
    }
    apart = differences({way: ways[way] for way in (LOOP, GROUPED, BATCHED)}, out, dx)
    operators = {way: Operators.of(ways[way], out, dx) for way in ways}
    seconds = timed(ways, out, dx, args.steps)
    ratios = {
        way: [loop / own for own, loop in zip(seconds[way], seconds[LOOP], strict=True)] for way in (GROUPED, BATCHED)
    }
    return {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": machine(args.threads),
        "versions": {"torch": torch.__version__},
        "has_kernel": there,
        "milliseconds": {way: round(1000 * statistics.median(values), 3) for way, values in seconds.items()},
        "over_loop": {way: round(statistics.median(values), 3) for way, values in ratios.items()},
        "operators": operators,
        "largest_relative_difference_to_loop": apart,
    }


def differences(ways: dict[str, Callable[..., Any]], out: Any, dx: Any) -> dict[str, float]:
    """How far output and gradients lie from the loop's, in the norm."""
    found: dict[str, list[Any]] = {}
    for way, step in ways.items():
        gradients = step(out.fill_(1.0), dx.fill_(1.0))
        found[way] = [each.double() for each in (out, dx, *gradients)]
    return {
        way: float(f"{max(float((a - b).norm() / b.norm()) for a, b in zip(own, found[LOOP], strict=True)):.1e}")
        for way, own in found.items()
        if way != LOOP
    }


def timed(ways: dict[str, Callable[..., Any]], out: Any, dx: Any, steps: int) -> dict[str, list[float]]:
    """Seconds of each step behind the warm-up; in every turn the ways come in another order."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(steps):
        for way in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            out.zero_(), dx.zero_()
            synchronise()
            started = time.perf_counter()
            ways[way](out, dx)
            synchronise()
            seconds[way].append(time.perf_counter() - started)
    return {way: values[WARM:] for way, values in seconds.items()}


def main() -> None:
    args = options()
    result = measure(args)
    keep(result, args.out)
    for way, milliseconds in result["milliseconds"].items():
        times = f"   {result['over_loop'][way]:.2f}x the loop's speed" if way in result["over_loop"] else ""
        print(f"{way:<10} {milliseconds:9.3f} ms{times}")


if __name__ == "__main__":
    main()
