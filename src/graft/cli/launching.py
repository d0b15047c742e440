"""`--processes N`: start this command again in N processes on this machine, by torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated

import typer

from graft.cli.common import STOPPED
from graft.errors import GraftError
from graft.utils import launched

Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        help="Start this many processes on this machine (docs/distributed.md). For several machines, use torchrun.",
        show_default=False,
    ),
]
Restarts = Annotated[
    int,
    typer.Option(
        "--restarts",
        min=0,
        help="With --processes: how often to start them again after one was lost or failed; the run then resumes.",
    ),
]

SAVING = 600
"""Seconds that processes have to finish their step and save after a signal."""


def several(processes: int | None) -> bool:
    """Whether this command runs in several processes."""
    return (processes or 1) > 1 or launched.size() > 1


def launch(processes: int | None, restarts: int = 0) -> None:
    """Run this command line in several processes and exit as they do. Nothing happens without `processes`, or inside them.

    What a signal or an error ended is started again, up to `restarts` times; a mistake of the user would only repeat itself.
    """
    if restarts and processes is None:
        raise typer.BadParameter("it needs --processes", param_hint="--restarts")
    if processes is None or launched.inside():
        return
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise GraftError(
            f"--processes is {processes}, but this machine has {torch.cuda.device_count()} GPUs: start fewer"
        )
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    code = 0
    for count in range(restarts + 1):
        os.environ[launched.RESTARTS] = str(count)
        code = _ended(processes)
        if code in (0, 2, STOPPED):
            break
    raise typer.Exit(code)


def _ended(processes: int) -> int:
    """Start the processes, wait for them, and return the exit code of the one that failed first; that of a signal as shells give it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, monitor_interval=0.1,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(os.getpid()),
    )  # fmt: skip
    # torch passes these on to the processes, which save and end. Where SIGHUP is ignored (nohup), it stays so.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    config.signals_to_handle = "SIGTERM,SIGINT" if ignored else "SIGTERM,SIGINT,SIGHUP"
    if hasattr(config, "shutdown_timeout"):  # older releases of torch give them 30 seconds
        config.shutdown_timeout = SAVING
    try:
        elastic_launch(config, sys.executable)("-m", "graft", *sys.argv[1:])
    except SignalException:
        return STOPPED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        typer.secho(f"error: process {rank} was ended by {name}, which ends the others", fg=typer.colors.RED, err=True)
        return 128 - failure.exitcode
    return 0
