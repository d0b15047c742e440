"""Real processes of Flower on loopback give the numbers of one process, though a client is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.cli import main
from graft.errors import GraftError, MissingExtra
from graft.federation.flower.launching import Connection, refuse_port_in_use, serve_over_flower
from graft.federation.folder import federate
from graft.federation.store import FILE, Store


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


class Process:
    """`graft federate WORDS` with its log."""

    def __init__(self, log: Path, *words: str) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        line = [sys.executable, "-m", "graft", "federate", *words]
        with log.open("ab") as file:
            self.process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end and self.process.poll() is None, f"{text!r} was not said:\n{self.said}"
            time.sleep(0.2)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(60)


@pytest.mark.slow
def test_three_clients_of_which_one_is_killed_give_the_numbers_of_one_process(
    federation: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("flwr", "1.42", reason="needs graft-llm[federated]")
    given = {**federation, "rounds": 3}
    federate(given, (), tmp_path / "alone")
    yaml = tmp_path / "f.json"
    yaml.write_text(json.dumps(given))
    at = f"127.0.0.1:{free_port()}"
    serve = (str(yaml), "--serve", at, "--clients", "3", "--out", str(tmp_path / "flower"))
    server, clients = Process(tmp_path / "server.log", *serve), {}
    try:
        server.wait_for("serving at", 120)
        for name in ("ada", "ben", "cleo"):
            own = tmp_path / f"{name}.json"  # each has its own rows and no others
            rows = Path(given["base"]["model"]).parent / f"{name}.jsonl"
            own.write_text(json.dumps({**given, "data": {**given["data"], "train": str(rows)}}))
            clients[name] = Process(tmp_path / f"{name}.log", str(own), "--join", at)
        server.wait_for("round 1/3", 240)
        clients["ben"].stop(signal.SIGKILL)
        clients["ben"] = Process(tmp_path / "ben.log", str(tmp_path / "ben.json"), "--join", at)
        assert server.process.wait(300) == 0, server.said
    finally:
        for each in (server, *clients.values()):
            each.stop()
    one, other = (Store.open(tmp_path / name / FILE, None) for name in ("alone", "flower"))
    assert "client ben joined again" in server.said and not other.left_out()
    assert torch.equal(one.state()[1]["accumulators"], other.state()[1]["accumulators"])
    assert [each.scores for each in one.rounds()] == [each.scores for each in other.rounds()]
    assert one.bytes_per_client(2) == other.bytes_per_client(2)


@pytest.mark.parametrize(
    ("connection", "said"),
    [
        (Connection("8400"), "an address is HOST:PORT"),
        (Connection("127.0.0.1:99999"), "an address is HOST:PORT"),
        (Connection("example.org:8400"), "give certificates, or accept that with --insecure"),
        (Connection("192.168.0.7:8400"), "give certificates, or accept that with --insecure"),
        (Connection("127.0.0.1.example.org:8400"), "give certificates, or accept that with --insecure"),
        (Connection("127.0.0.1:8400", keys=Path("key")), "--keys needs --tls"),
    ],
)
def test_a_connection_that_cannot_be_is_refused(connection: Connection, said: str) -> None:
    with pytest.raises(GraftError, match=said):
        connection.check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("data.validation=5",), "name a data set of the server's own"),
        (("method=local", "adapter=lora"), "nothing to serve"),
    ],
)
def test_what_cannot_be_served_is_refused(
    federation: Any, tmp_path: Path, changes: Any, said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("graft.federation.flower.launching._require_flower", lambda: None)
    yaml = tmp_path / "f.json"
    yaml.write_text(json.dumps(federation))
    with pytest.raises(GraftError, match=said):
        serve_over_flower(
            yaml, changes, tmp_path / "out", Connection("127.0.0.1:1"), resume=False, expected=3, say=print
        )


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = Connection(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(GraftError, match=f"cannot listen at {at.address}: .*Choose another port"):
            refuse_port_in_use(at)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--serve 127.0.0.1:1 --join 127.0.0.1:1", "give one of them"),
        ("--tls certificates", "give one of them with --tls"),
        ("--clients 3", "--clients is for --serve"),
        ("--join 127.0.0.1:1 --resume", "--join writes nothing here"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(words: str, said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["federate", "f.yaml", *words.split()])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_without_flower_the_extra_is_named(federation: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    yaml = tmp_path / "f.json"
    yaml.write_text(json.dumps(federation))
    with pytest.raises(MissingExtra, match="graft-llm.federated."):
        serve_over_flower(yaml, (), tmp_path / "out", Connection("127.0.0.1:1"), resume=False, expected=None, say=print)
