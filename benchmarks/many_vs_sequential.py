"""Eight small jobs together on one base, against Graft one after another, against PEFT one after another.

    python benchmarks/many_vs_sequential.py [--steps 12] [--repeats 3] [--dtype float32] [--quantise nf4] [--threads 2] [--tiny]

The jobs are LoRA of rank 4, 8, 16 and 64, DoRA, a prefix, a series and a parallel adapter, each with its own data and batches of four
samples of about 100 tokens. All three start from the same adapters on the same base and see the same rows in the same order. PEFT trains
the six kinds that it has, by a plain loop (AdamW, clipping, one padded batch per step), which is quicker than its Trainer. Each way is a
process of its own; the ways take turns, so that a busy machine slows all alike. On a base in 4 bits (`--quantise nf4`, for all ways alike)
each pass dequantises every layer twice, whatever its number of tokens; DoRA, which reads the dense weight, is then left out.

Reported are tokens/s (real tokens; step k of all jobs is one unit of time, from the end of one step to that of the next, the first two
not timed; against PEFT only the kinds that it has, together in one engine), the processor time of the training loops, peaks of memory
(of the GPU where there is one, which is waited for at the end of each step), the loss curve of every job by every way, which have to be
equal, and a profile of the step: which part and which operators take its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_loop import peft_loop
from random_base import add_options, make_base, parsed, samples
from turns import Run, keep, machine, peak_bytes, release, speed, take_turns, watch

JOBS: dict[str, dict[str, Any]] = {
    **{f"lora-{rank}": {"kind": "lora", "rank": rank, "alpha": 16, "sites": "linear"} for rank in (4, 8, 16, 64)},
    "dora": {"kind": "dora", "rank": 8, "sites": "attn.q attn.v"},
    "prefix": {"kind": "prefix", "tokens": 16, "positions": "after_prefix", "init_std": 1.0},
    "series": {"kind": "series", "bottleneck": 32},
    "parallel": {"kind": "parallel", "bottleneck": 32},
}
NOT_OF_PEFT, NOT_QUANTISED = ("series", "parallel"), ("dora",)
WAYS = ("together", "one by one", "of PEFT together", "of PEFT one by one", "PEFT")
LR, CLIP = 1e-3, 1.0
TOP = 12
"""Operators that the profile names."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="samples per job and step")
    parser.add_argument("--budget", type=int, default=4096, help="tokens per forward pass of Graft")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA and DoRA; PEFT then draws its own")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "many_vs_sequential.json"))
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parsed(parser)


def jobs_of(args: argparse.Namespace, of_peft: bool = False) -> list[str]:
    """The names of the jobs that this base can have, or of those among them whose kind PEFT has."""
    left_out = (NOT_QUANTISED if args.quantise else ()) + (NOT_OF_PEFT if of_peft else ())
    return [name for name in JOBS if name not in left_out]


def prepare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The base, and all adapters as they start, in Graft's format and in PEFT's."""
    import torch

    import graft

    model = make_base(args)
    count = model.num_parameters()
    for name in jobs_of(args):
        torch.manual_seed(list(JOBS).index(name))
        adapter = JOBS[name]
        dropout = {"dropout": args.dropout} if adapter["kind"] in ("lora", "dora") else {}
        graft.attach(model, {name: {**adapter, **dropout}})
        graft.save(model, name, work / "graft" / name)
        if name in jobs_of(args, of_peft=True):
            graft.export(model, name, work / "peft" / name, format="peft")
    return {"parameters": count, "jobs": {name: JOBS[name] for name in jobs_of(args)}}


def data_of(args: argparse.Namespace, name: str) -> Any:
    return samples(args, args.steps * args.batch, seed=list(JOBS).index(name))


def train_graft(args: argparse.Namespace, work: Path, groups: list[list[str]]) -> Run:
    """Each group of jobs is one engine; the groups come one after another on one base."""
    import graft
    from graft.runs.folder import RunFolder
    from graft.training.engine import Engine
    from graft.training.settings import Settings

    model, found = make_base(args), {}
    before, processor = peak_bytes(), 0.0
    for group in groups:
        jobs = [job_of(args, work, model, name) for name in group]
        folder = RunFolder(tempfile.mkdtemp(dir=work)).create()
        settings, clock = Settings(pad_id=0, token_budget=args.budget), watch()
        started = time.process_time()
        Engine(model, jobs, folder, settings, clock, lambda job: None).run()
        processor += time.process_time() - started
        lines = [line for line in folder.metrics.read() if "loss" in line]
        for name in group:
            own = [line for line in lines if line["job"] == name]
            found[name] = {key: [line[key] for line in own] for key in ("loss", "tokens")}
            found[name]["seconds"] = [seconds / len(group) for seconds in clock.seconds]
            graft.detach(model, name)
    return summed(found, before, processor)


def job_of(args: argparse.Namespace, work: Path, model: Any, name: str) -> Any:
    import graft
    from graft.config.train import TrainConfig
    from graft.training.job import Job

    graft.load(model, work / "graft" / name, name=name)
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch,
        token_budget=args.budget,
        lr=LR,
        clip=CLIP,
        seed=list(JOBS).index(name),
        schedule="constant",
    )
    return Job.make(model, name, config, data_of(args, name), None)


def summed(found: dict[str, dict[str, list[float]]], before: int, processor: float) -> Run:
    """Step k of all jobs as one step."""
    jobs = list(found.values())
    together = {
        key: [sum(step) for step in zip(*(job[key] for job in jobs), strict=True)] for key in ("seconds", "tokens")
    }
    losses = {name: job["loss"] for name, job in found.items()}
    return {"losses": losses, **together, "peak": peak_bytes(), "before": before, "processor": processor}


def train_peft(args: argparse.Namespace, work: Path) -> Run:
    """The kinds that PEFT has, one after another, each on a base of its own that is loaded outside the clock."""
    from graft.data.batches import samples_of_step, steps_per_epoch

    found, processor, before = {}, 0.0, 0
    for name in jobs_of(args, of_peft=True):
        data = data_of(args, name)
        order = data.epoch_order(list(JOBS).index(name), 0)
        count = min(args.steps, steps_per_epoch(data, args.batch))
        steps = [[data[index] for index in samples_of_step(data, order, args.batch, step)] for step in range(count)]
        model = wrapped(args, work, name)
        before, started = before or peak_bytes(), time.process_time()
        found[name] = peft_loop(model, steps, LR, CLIP)
        processor += time.process_time() - started
    return summed(found, before, processor)


def wrapped(args: argparse.Namespace, work: Path, name: str) -> Any:
    from peft import PeftModel

    prefix = JOBS[name]["kind"] == "prefix"  # loads only as one that does not train
    base = make_base(args)
    model = PeftModel.from_pretrained(base, work / "peft" / name, is_trainable=not prefix)
    if prefix:
        model.peft_config["default"].inference_mode = False
        model.prompt_encoder.requires_grad_(True)
    return model.train()


def profile(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Where the time of a step of all jobs goes: the passes and the updates, and the operators by their own time."""
    import torch

    from graft.attaching.active import set_trainable
    from graft.training.batching import Batcher
    from graft.training.forward.layout import decide, laid_out
    from graft.training.forward.modes import set_training
    from graft.training.forward.tasks import forward_of
    from graft.training.updates.rules import rule_of

    model, names = make_base(args), jobs_of(args)
    jobs = [job_of(args, work, model, name) for name in names]
    set_trainable(model, names)
    forward, seconds = forward_of(model), {"passes": [], "updates": []}
    batcher = Batcher(args.budget, "padded", 0)
    layout = decide(forward, jobs, "auto", batcher).layout
    batcher, rule = replace(batcher, layout=layout), rule_of(jobs[0])
    set_training(model, names)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with laid_out(model, layout):
        rule.prepare(forward, jobs, batcher)  # warm
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(min(3, args.steps)):
                started = time.perf_counter()
                gradients = rule.prepare(forward, jobs, batcher)
                middle = time.perf_counter()
                for job in jobs:
                    rule.update(job, gradients[job.name])
                seconds["passes"].append(middle - started)
                seconds["updates"].append(time.perf_counter() - middle)
    events, gpu = profiler.key_averages(), torch.cuda.is_available()
    own = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    total = sum(own.values())
    shown = sorted(own, key=lambda key: -own[key])[:TOP]
    return {
        "layout": layout,
        "seconds": {part: round(statistics.median(values), 4) for part, values in seconds.items()},
        "operators": {key: round(own[key] / total, 4) for key in shown},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        facts = prepare(args, Path(scratch))
        release()
        runs = take_turns(__file__, WAYS, args.repeats, Path(scratch))
        where = profile(args, Path(scratch))
    hidden = ("out", "worker", "work")
    return {
        "settings": {key: value for key, value in vars(args).items() if key not in hidden},
        **facts,
        "machine": machine(args.threads),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "tokens_per_second": {way: [round(speed(run), 1) for run in runs[way]] for way in WAYS},
        "over_one_by_one": ratio(runs["together"], runs["one by one"]),
        "over_peft": ratio(runs["of PEFT together"], runs["PEFT"]),
        "one_by_one_over_peft": ratio(runs["of PEFT one by one"], runs["PEFT"]),
        "processor_seconds": {way: [round(run["processor"], 2) for run in runs[way]] for way in WAYS},
        "peak_mib": {way: round(statistics.median(run["peak"] for run in runs[way]) / 2**20) for way in WAYS},
        "before_mib": {way: round(statistics.median(run["before"] for run in runs[way]) / 2**20) for way in WAYS},
        "largest_relative_loss_difference": {
            "one by one": apart(runs["together"][0], runs["one by one"][0]),
            "PEFT": apart(runs["one by one"][0], runs["PEFT"][0]),
        },
        "losses": {way: runs[way][0]["losses"] for way in ("together", "one by one", "PEFT")},
        "profile": where,
    }


def ratio(ours: list[Run], theirs: list[Run]) -> dict[str, float]:
    """How many times faster, by tokens per second and by processor time per token (medians over the turns)."""
    pairs = list(zip(ours, theirs, strict=True))
    by_processor = [other["processor"] / own["processor"] for own, other in pairs]
    return {
        "speed": round(statistics.median(speed(own) / speed(other) for own, other in pairs), 3),
        "processor": round(statistics.median(by_processor), 3),
    }


def apart(run: Run, other: Run) -> float:
    """The largest relative difference between the loss curves of the jobs that both have."""
    return max(
        abs(a - b) / b
        for name, curve in other["losses"].items()
        for a, b in zip(run["losses"][name], curve, strict=True)
    )


def main() -> None:
    args = options()
    if args.worker:
        every, few, work = jobs_of(args), jobs_of(args, of_peft=True), Path(args.work)
        groups = {
            "together": [every],
            "one by one": [[name] for name in every],
            "of PEFT together": [few],
            "of PEFT one by one": [[name] for name in few],
        }
        run = train_peft(args, work) if args.worker == "PEFT" else train_graft(args, work, groups[args.worker])
        print(json.dumps(run))
        return
    result = measure(args)
    keep(result, args.out)
    differences = result["largest_relative_loss_difference"]
    print(
        f"Together / one by one: {result['over_one_by_one']['speed']:.2f}x tokens/s; of the kinds of PEFT, together / PEFT: "
        f"{result['over_peft']['speed']:.2f}x; losses differ by at most {differences['one by one']:.1e} and {differences['PEFT']:.1e}"
    )
    bound = 1e-3 if args.dtype == "float32" else 5e-2
    if differences["one by one"] > bound or (not args.dropout and differences["PEFT"] > bound):
        raise SystemExit("the loss curves are not equal")


if __name__ == "__main__":
    main()
