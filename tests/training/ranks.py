"""What each process of a run of several does in tests: the company of test_company.py, dealt to ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import ROOT

BUDGET = 256


def started(size: int, *arguments: str, module: str = "ranks", **environment: str) -> list[subprocess.Popen[str]]:
    """This file, or another one beside it, in so many processes, which meet at a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    command = [sys.executable, "-m", f"tests.training.{module}", *arguments]
    return [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str]]:
    """The exit code and the output of each."""
    try:
        return [(process.wait(seconds), process.communicate()[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def found(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[float]]]:
    """Parameters at the end and losses of a run, by job."""
    parameters = {path.stem: load_file(path) for path in (folder / "ended").glob("*.safetensors")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses: dict[str, list[float]] = {}
    for line in lines:
        losses.setdefault(line["job"], []).append(line.get("loss", line.get("validation_loss")))
    return parameters, losses


def train(mode: str, dtype: torch.dtype, names: list[str], path: Path, checkpoint: int | None = None) -> str:
    """Train these jobs on the ranks that are here; jobs leave their parameters in the folder `ended`. Returns how the run ended."""
    from graft.distributed.group import together
    from graft.distributed.sharded import shard
    from graft.distributed.shares import Shares
    from graft.training.batching import Batcher
    from graft.training.engine import Engine
    from graft.training.job import Job
    from graft.training.offload import empty
    from graft.training.records.progress import Reporter
    from graft.training.settings import Settings
    from graft.training.staging import cut_into_stages
    from graft.training.world import folder_of
    from tests.training.test_company import world

    with together() as group:
        shares = Shares(group, mode)  # type: ignore[arg-type]
        model, jobs = world(
            dtype,
            names,
            (lambda model: shard(model, group.size, model.device, dtype)) if mode == "fsdp2" else lambda model: None,
        )
        batcher = Batcher(BUDGET, "padded", 0, shares)
        if mode == "pipeline":
            cut_into_stages(model, jobs, batcher, "auto")
        shares.settle([(name, 1.0) for name in names])
        for job in jobs:
            job.here = shares.here(job.name)
            if not job.here:
                empty(job)
        folder = folder_of(group, path)
        if checkpoint is None:
            with group.agreed():
                folder.create()
                if group.leads:
                    (path / "ended").mkdir()

        def publish(job: Job) -> None:
            tensors = {key: parameter.detach().clone() for key, parameter in job.params.items()}
            save_file(tensors, path / "ended" / f"{job.name}.safetensors")

        settings = Settings(pad_id=0, token_budget=BUDGET, save_every=3)
        engine = Engine(model, jobs, folder, settings, Reporter(1, quiet=True), publish, shares=shares)
        return engine.run(checkpoint)


def faulty() -> None:
    """On rank 1, passes with the job `ia3` raise an error from step 3 on, and losses of `series` are not numbers from step 5 on."""
    from graft.training.forward.causal import Forward
    from graft.training.job import Job

    plain, rows, at = Forward.losses, Job.rows, dict[str, int]()

    def noted(job: Job) -> Any:
        at[job.name] = job.step
        return rows(job)

    def losses(forward: Forward, batch: Any, context: Any) -> Tensor:
        made = plain(forward, batch, context)
        if int(os.environ["RANK"]) == 1 and torch.is_grad_enabled():
            if "ia3" in context.names and at["ia3"] >= 2:
                raise RuntimeError("a pass fails here")
            if "series" in context.names and at["series"] >= 4:
                made = made * float("nan")
        return made

    Job.rows, Forward.losses = noted, losses  # type: ignore[method-assign]


def main() -> None:
    """ranks.py FOLDER DTYPE MODES NAMES [faulty | CHECKPOINT]"""
    torch.set_num_threads(1)
    import transformers

    from tests.training.conftest import exact_norm

    transformers.models.llama.modeling_llama.LlamaRMSNorm.forward = exact_norm
    path, dtype, modes, names, *more = sys.argv[1:]
    if more == ["faulty"]:
        faulty()
    from graft.distributed.group import together

    with together():
        for mode in modes.split(","):
            checkpoint = int(more[0]) if more and more[0].isdigit() else None
            train(mode, getattr(torch, dtype), names.split(","), Path(path) / mode, checkpoint)


if __name__ == "__main__":
    main()
