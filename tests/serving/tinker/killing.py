"""A proxy before a training server that kills the server at a request of one's choice, and starts it again on what it left."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from tests.serving.conftest import TOKEN

NURSERY = Path(__file__).with_name("nursery.py")
UNCOUNTED = (
    "retrieve_future",
    "retrieve_futures",
    "session_heartbeat",
    "telemetry",
    "client/config",
    "client/dynamic_config",
)
"""Requests that come when time passes, so that their number says nothing."""
Moment = Literal["before", "lost", "answered", "later"]
"""When the server dies: before it hears of the request; when it has answered, and the answer is lost, or is not; or a little later."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Servers:
    """Servers of one base on one port, one after the other."""

    def __init__(self, base: Path) -> None:
        self.port = free_port()
        command = [sys.executable, str(NURSERY), str(base), str(self.port), TOKEN]
        self._nursery = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._folder = Path()
        self._heard()

    def start(self, folder: Path | None = None) -> None:
        """Start a server on a folder, or again on the last one. The one that runs is killed first."""
        self._folder = folder or self._folder
        self._say(f"start {self._folder}")

    def stop(self) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        self._nursery.wait(20)

    def _say(self, text: str) -> None:
        assert self._nursery.stdin is not None
        print(text, file=self._nursery.stdin, flush=True)
        self._heard()

    def _heard(self) -> None:
        assert self._nursery.stdout is not None
        assert self._nursery.stdout.readline(), "the nursery failed"


@dataclass
class Plan:
    """The request at which the server dies, counted from 1; 0 is none."""

    at: int = 0
    moment: Moment = "answered"
    seen: int = 0
    """Requests so far."""
    died: bool = False


class Proxy:
    """Hands requests on, one at a time for each connection, and kills by plan."""

    def __init__(self, servers: Servers) -> None:
        self.servers, self.plan = servers, Plan()
        self._turn = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                proxy.hand_on(self)

            do_GET = do_DELETE = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def hand_on(self, handler: BaseHTTPRequestHandler) -> None:
        """Ask the server and answer. A connection of a server that died is closed without an answer."""
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        plan, now = self.plan, False
        if not handler.path.endswith(UNCOUNTED):
            with self._turn:
                plan.seen += 1
                now = plan.seen == plan.at
        if now and plan.moment == "before":
            self._kill(plan)
        try:
            status, headers, content = self._ask(handler, body)
        except (OSError, http.client.HTTPException):
            handler.close_connection = True
            return
        if now and plan.moment in ("lost", "answered"):
            self._kill(plan)
        if now and plan.moment == "lost":
            handler.close_connection = True
            return
        if now and plan.moment == "later":
            threading.Timer(0.002 * (plan.at % 10), self._kill, [plan]).start()
        handler.send_response(status)
        for name, value in headers:
            if name.lower() in ("content-type", "location", "retry-after"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _kill(self, plan: Plan) -> None:
        self.servers.start()
        plan.died = True

    def _ask(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = self._connected()
        try:
            headers = {
                name: value for name, value in handler.headers.items() if name.lower() not in ("host", "connection")
            }
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        """A connection to the server; while there is none, somebody starts it."""
        for _ in range(2000):
            connection = http.client.HTTPConnection("127.0.0.1", self.servers.port, timeout=60)
            try:
                connection.connect()
                return connection
            except ConnectionError:
                time.sleep(0.01)
        raise ConnectionError("there is no server")
