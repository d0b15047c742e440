"""A server in a thread of the tests, with a base and three adapters of tiny size."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs_at_hand import make_run

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

ADAPTERS: dict[str, Any] = {
    "style": {"kind": "lora", "rank": 4, "sites": "attn.q attn.v"},
    "task": {"kind": "lora", "rank": 2, "sites": "mlp.down"},
    "lead": {"kind": "prefix", "tokens": 3},
}
TOKEN = "tml-a-secret-of-tests"


class Running:
    """A server that answers at `url`."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        self.app = app
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=10))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    @property
    def engine(self) -> Any:
        return self.app.state.engine

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="session")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("served") / "run", ADAPTERS, scale=3.0)


@pytest.fixture(scope="session")
def loaded(a_run: Path) -> Any:
    from graft.generation.loaded import load_candidates

    return load_candidates(a_run)


@pytest.fixture(scope="session")
def running(loaded: Any) -> Iterator[Running]:
    from graft.serving.app import make_app

    server = Running(make_app(loaded, token=TOKEN, rows=8, most=40))
    yield server
    server.stop()
