"""Start Flower's processes, and wait for them: a SuperLink with the federation's server, or a SuperNode with a client.

They listen on loopback unless told otherwise, and send no telemetry. Flower's own files lie in a scratch folder that goes afterwards.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.config.federation import LocalMethod
from graft.errors import GraftError, require
from graft.federation.definition import read_federation
from graft.federation.flower.apps import ENDED, ORDERS, SAID
from graft.federation.workplace import clients_here
from graft.utils.hosts import is_loopback
from graft.utils.jsonl import read_json

OLDEST = (1, 42)
"""The first release of flwr with the connections that are used here."""
RECONNECT = 600
"""Seconds for which a client tries to reach a server that is not there."""
LASTING, QUICK_ENDS, PAUSE = 20.0, 10, 2.0
"""A connection counts as made if it lasted so many seconds. A server that is started again knows no clients, and Flower's SuperNode then
ends, although the server is there. It is started again, at most so many times in a row without a connection, so many seconds apart."""
APP = """\
[project]
name = "graft-federation"
version = "1.0.0"
description = "A federation of Graft"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "graft"
[tool.flwr.app.components]
serverapp = "graft_federation.server:app"
clientapp = "graft_federation.client:app"
[tool.flwr.app.config]
"""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Connection:
    """Where the server is, and how clients reach it."""

    address: str
    """HOST:PORT"""
    tls: Path | None = None
    """Of the server: a folder with ca.crt, server.crt and server.key. Of a client: the certificate of the authority."""
    keys: Path | None = None
    """Of the server: a folder with the public keys (.pub) of the clients that may join. Of a client: its private key."""
    insecure: bool = False
    """Whether messages may travel unencrypted beyond this machine."""

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def check(self) -> None:
        """Raise `GraftError` for what cannot be an address, and for an open connection beyond this machine."""
        host, colon, port = self.address.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise GraftError(f"an address is HOST:PORT, such as 127.0.0.1:8400; given: {self.address}")
        if not is_loopback(host) and self.tls is None and not self.insecure:
            raise GraftError(
                f"{host} is not this machine, and without --tls everybody between could read and change what travels: give certificates, "
                "or accept that with --insecure"
            )
        if self.keys is not None and self.tls is None:
            raise GraftError("--keys needs --tls: Flower checks keys over encrypted connections only")


def serve_over_flower(
    source: Path, changes: Sequence[str], out: Path, at: Connection, *, resume: bool, expected: int | None, say: Say
) -> dict[str, Any]:
    """Run the server of a federation for clients that join. Returns the report.

    expected: clients to wait for at the beginning. The server then reads no rows of clients; without it, it counts those of data.train.
    """
    from graft.federation.folder import report_in

    _require_flower()
    at.check()
    federation = read_federation(source, changes)
    if isinstance(federation.config.method, LocalMethod):
        raise GraftError("method local exchanges nothing, so there is nothing to serve: leave out --serve")
    if expected is not None:
        federation.without_clients()
    refuse_port_in_use(at)
    with _scratch() as scratch:
        orders = {"source": str(source.resolve()), "changes": list(changes), "out": str(out.resolve())}
        orders |= {"resume": resume, "scratch": str(scratch), "reads_rows": expected is None}
        orders |= {"expected": len(clients_here(federation)) if expected is None else expected}
        certificates = [] if at.tls is None else _certificates(at.tls)
        options = ["--host", at.host, "--port", str(at.port), "--disable-runtime-dependency-installation"]
        options += certificates or ["--insecure"]
        options += ["--enable-supernode-auth"] if at.keys is not None else []
        with _running("flower-superlink", options, scratch, orders) as link:
            _wait_until_open(at, link, scratch)
            for key in sorted(at.keys.glob("*.pub")) if at.keys is not None else ():
                _flwr(scratch, "supernode", "register", str(key.resolve()))
            _write_app(scratch / "app")
            _flwr(scratch, "run", str(scratch / "app"))
            say(f"serving at {at.address}")
            _follow(scratch, link, say)
    return report_in(out)


def join_over_flower(source: Path, changes: Sequence[str], client: str | None, at: Connection, say: Say) -> None:
    """Work as a client until the server has been gone for a while, or the user stops it."""
    _require_flower()
    at.check()
    names = list(clients_here(read_federation(source, changes)))
    if client is None and len(names) > 1:
        raise GraftError(
            f"these data belong to several clients: say which one this is with --client ({', '.join(names)})"
        )
    client = client or names[0]
    if client not in names:
        raise GraftError(f"there is no client '{client}' in these data; there is {', '.join(names)}")
    with _scratch() as scratch:
        orders = {"source": str(source.resolve()), "changes": list(changes), "client": client}
        options = ["--superlink", at.address, "--port", str(_free_port()), "--max-wait-time", str(RECONNECT)]
        options += ["--insecure"] if at.tls is None else ["--root-certificates", str(at.tls.resolve())]
        options += [] if at.keys is None else ["--auth-supernode-private-key", str(at.keys.resolve())]
        say(f"client {client} joins {at.address}")
        quick, joined = 0, False
        while quick < QUICK_ENDS:
            started = time.monotonic()
            with _running("flower-supernode", options, scratch, orders) as node:
                code = node.wait()
            lasted = time.monotonic() - started > LASTING
            if not (lasted or joined) or not _is_open(at):
                break
            joined, quick = True, 0 if lasted else quick + 1
            say(f"the connection to {at.address} ended; trying again")
            time.sleep(PAUSE)
        raise GraftError(f"the connection to {at.address} ended (code {code}):\n{_last_lines(scratch)}")


def _require_flower() -> None:
    require("flwr", "federated")
    version = importlib.metadata.version("flwr")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise GraftError(
            f"flwr {version} is installed, but {'.'.join(map(str, OLDEST))} or later is needed. Run: pip install -U 'graft-llm[federated]'"
        )


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="graft-flower-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(
    command: str, options: Sequence[str], scratch: Path, orders: Mapping[str, Any]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of Flower's for a block of code; it ends with this process too."""
    line = [sys.executable, "-m", "graft.federation.flower.guard", str(_script(command)), *options]
    with (scratch / "log.txt").open("ab") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, env=_environment(scratch, orders))
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _environment(scratch: Path, orders: Mapping[str, Any] | None = None) -> dict[str, str]:
    path = os.pathsep.join([str(_script("flwr").parent), os.environ.get("PATH", "")])
    own = {} if orders is None else {ORDERS: json.dumps(orders)}
    return {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(scratch / "home"), "PATH": path, **own}


def _script(name: str) -> Path:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise GraftError(f"flwr is installed, but its command {name} is not on the path")
    return Path(found)


def _write_app(folder: Path) -> None:
    """Write the app that Flower hands to its processes: two files that name ours."""
    package = folder / "graft_federation"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(APP, encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    for name in ("server", "client"):
        text = f"from graft.federation.flower.apps import {name}_app\n\napp = {name}_app()\n"
        (package / f"{name}.py").write_text(text, encoding="utf-8")


def _certificates(folder: Path) -> list[str]:
    files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    for name in files.values():
        if not (folder / name).is_file():
            raise GraftError(f"{folder / name} is missing: --tls names a folder with {', '.join(files.values())}")
    return [word for option, name in files.items() for word in (option, str((folder / name).resolve()))]


def _wait_until_open(at: Connection, link: subprocess.Popen[bytes], scratch: Path) -> None:
    """Wait for the SuperLink, and write how its own command reaches it."""
    secure = "insecure = true" if at.tls is None else f'root-certificates = "{(at.tls / "ca.crt").resolve()}"'
    home = scratch / "home"
    home.mkdir(exist_ok=True)
    host = "127.0.0.1" if at.host == "0.0.0.0" else at.host
    text = f'[superlink]\ndefault = "graft"\n[superlink.graft]\naddress = "{host}:{at.port}"\n{secure}\n'
    (home / "config.toml").write_text(text, encoding="utf-8")
    end = time.monotonic() + 120
    while time.monotonic() < end and link.poll() is None:
        if _is_open(at):
            return
        time.sleep(0.2)
    raise GraftError(f"Flower's SuperLink did not start:\n{_last_lines(scratch)}")


def _is_open(at: Connection) -> bool:
    with socket.socket() as trial:
        trial.settimeout(1)
        return trial.connect_ex(("127.0.0.1" if at.host == "0.0.0.0" else at.host, at.port)) == 0


def _flwr(scratch: Path, *words: str) -> None:
    done = subprocess.run([str(_script("flwr")), *words], env=_environment(scratch), capture_output=True, text=True)
    if done.returncode:
        raise GraftError(f"flwr {words[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _follow(scratch: Path, link: subprocess.Popen[bytes], say: Say) -> None:
    """Repeat what the server says until it has ended. Raises its error."""
    told = 0
    while True:
        ended = (scratch / ENDED).is_file()
        said = (scratch / SAID).read_text(encoding="utf-8") if (scratch / SAID).exists() else ""
        for line in said[told:].splitlines() if said.endswith("\n") else ():
            say(line)
        told = len(said) if said.endswith("\n") else told
        if ended:
            error = read_json(scratch / ENDED)
            if error.get("ours"):
                raise RuntimeError(error["error"])
            if error["error"] is not None:
                raise GraftError(error["error"])
            return
        if link.poll() is not None:
            raise GraftError(f"Flower's SuperLink ended:\n{_last_lines(scratch)}")
        time.sleep(0.3)


def _last_lines(scratch: Path) -> str:
    log = scratch / "log.txt"
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:]) if log.exists() else ""


def refuse_port_in_use(at: Connection) -> None:
    """Raise `GraftError` where the server cannot listen."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((at.host, at.port))
        except OSError as error:
            raise GraftError(
                f"cannot listen at {at.address}: {error.strerror}. Choose another port, or stop what uses it"
            ) from error


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]
