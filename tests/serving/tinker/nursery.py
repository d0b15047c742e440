"""Runs apart from the tests: loads a base once, and forks a training server from it as often as it is told, so that one starts in no time.

python nursery.py BASE PORT TOKEN, then lines on its standard input:

    start FOLDER    fork a server on a state folder; answers when it listens
    kill            SIGKILL for the server; answers when it is gone
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
EVERY = 4
"""Ticks between snapshots: few, so that a short script has some."""


def serve(loaded: Any, port: int, token: str, state: Path) -> None:
    """Serve until somebody kills this process."""
    import uvicorn

    from graft.serving.app import make_app  # imported before, so that a fork need not

    app = make_app(loaded, token=token, rows=8, most=40, state=state)
    uvicorn.run(app, port=port, log_level="error")


def start(loaded: Any, port: int, token: str, state: Path) -> int:
    """Fork a server and return its process id."""
    child = os.fork()
    if not child:
        sys.stdin.close()
        serve(loaded, port, token, state)
        os._exit(1)
    while True:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return child
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the server ended before it listened")
        time.sleep(0.005)


def main() -> None:
    base, port, token = sys.argv[1:]
    import torch

    from graft.config.base import BaseConfig
    from graft.generation.loaded import load_candidates
    from graft.serving.app import make_app
    from graft.serving.tinker import service, training

    assert make_app and training
    torch.set_num_threads(1)  # a fork has no threads but its own
    service.EVERY = EVERY
    loaded = load_candidates(base=BaseConfig(model=base, device="cpu"))
    child = 0
    print("ready", flush=True)
    for line in sys.stdin:
        order, _, folder = line.strip().partition(" ")
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            child = 0
        if order == "start":
            child = start(loaded, int(port), token, Path(folder))
        print("done", flush=True)
    if child:
        os.kill(child, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
