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


def launch(processes: int | None, restarts: int = 0) -> None:
    """Run this command line in several processes and exit as they do. Nothing happens without `processes`, or inside them."""
    if restarts and processes is None:
        raise typer.BadParameter("it needs --processes", param_hint="--restarts")
    if processes is None or launched.inside():
        return
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise GraftError(
            f"--processes is {processes}, but this machine has {torch.cuda.device_count()} GPUs: start fewer"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=restarts, monitor_interval=0.1,
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
        raise typer.Exit(STOPPED) from None
    except ChildFailedError as error:
        raise typer.Exit(_code(error)) from None
    raise typer.Exit(0)


def _code(error: BaseException) -> int:
    """The exit code of the process that failed first; that of a signal as shells give it."""
    code = error.get_first_failure()[1].exitcode  # type: ignore[attr-defined]
    return 128 - code if code < 0 else code
