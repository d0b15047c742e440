"""What Flower's processes run. Flower starts a process for each message to a client, and one for the server.

They find what they are about in the environment variable GRAFT_FEDERATION, which `launching` sets.
"""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

from graft.errors import GraftError, require
from graft.federation.client import Client
from graft.federation.definition import read_federation
from graft.federation.flower.grid import FIELD, RECORD, GridTransport, wrapped
from graft.federation.folder import opened, serve
from graft.federation.methods.choosing import method_of
from graft.federation.server import Server
from graft.federation.workplace import Workplace
from graft.utils.files import write_json_atomic

ORDERS = "GRAFT_FEDERATION"
SAID, ENDED = "said.txt", "ended.json"
"""Files of the server's working folder: what it says, a line at a time, and how it ended."""


def client_app() -> Any:
    """Flower's ClientApp."""
    app = require("flwr.clientapp", "federated").ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        orders = json.loads(os.environ[ORDERS])
        place = Workplace(read_federation(orders["source"], orders["changes"]))
        answer = Client(place, method_of(place), orders["client"]).answer(message.content[RECORD][FIELD])
        return require("flwr.app", "federated").Message(wrapped(answer), reply_to=message)

    return app


def server_app() -> Any:
    """Flower's ServerApp."""
    app = require("flwr.serverapp", "federated").ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        orders = json.loads(os.environ[ORDERS])
        ended: dict[str, Any] = {"error": "the server was stopped"}
        try:
            _serve(grid, orders)
            ended = {"error": None}
        except GraftError as error:
            ended = {"error": str(error)}
        except Exception:
            ended = {"error": traceback.format_exc(), "ours": True}
        finally:
            write_json_atomic(Path(orders["scratch"]) / ENDED, ended)

    return app


def _serve(grid: Any, orders: dict[str, Any]) -> None:
    out, said = Path(orders["out"]), Path(orders["scratch"]) / SAID

    def say(text: str) -> None:
        with said.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    with opened(orders["source"], orders["changes"], out, resume=orders["resume"], say=say) as (federation, store):
        place = Workplace(federation if orders["reads_rows"] else federation.without_clients())
        transport = GridTransport(grid, orders["expected"], federation.config.timeout, say)
        serve(Server(place, method_of(place), store, transport, say), out)
