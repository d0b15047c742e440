"""The server's rounds: who is left out, what is refused, what a kill leaves, and what the report says."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.errors import GraftError
from graft.federation.client import Client, read_card
from graft.federation.definition import read_federation
from graft.federation.folder import federate
from graft.federation.messages import Message, decoded
from graft.federation.methods.choosing import method_of
from graft.federation.server import InProcess, Server
from graft.federation.store import FILE, Store
from graft.federation.workplace import Workplace
from graft.runs.storage import Storage
from tests.federation.conftest import tiny
from tests.walk import graft_command

LORA = {"kind": "lora", "rank": 2, "sites": "attn.q"}


def state_of(out: Path) -> tuple[int, dict[str, torch.Tensor]]:
    return Store.open(out / FILE, None).state()  # pyright: ignore[reportReturnType]


def same(one: Path, other: Path) -> bool:
    (number, first), (again, second) = state_of(one), state_of(other)
    rounds = [[(each.number, each.scores) for each in Store.open(out / FILE, None).rounds()] for out in (one, other)]
    equal = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return number == again and equal and rounds[0] == rounds[1]


class Faulty(InProcess):
    """Clients whose answers are changed on their way; one that is changed to None never answers."""

    changes: Mapping[str, Any] = {}

    def ask(self, names: Any, message: Any, seconds: float) -> Iterator[tuple[str, bytes]]:
        for name, data in super().ask(names, message, seconds):
            change = self.changes.get(name, lambda message: message.encoded())
            if (answer := change(decoded(data))) is not None:
                yield name, answer


def with_tensors(**changes: Any) -> Any:
    def change(message: Message) -> bytes:
        tensors = {**message.tensors, **{key: make(message.tensors[key]) for key, make in changes.items()}}
        return Message(message.kind, message.round, message.client, message.base, tensors, message.text).encoded()

    return change


FAULTS = {
    "its slopes hold numbers that are NaN": with_tensors(slopes=lambda each: each * float("nan")),
    r"its slopes should have shape \(4,\)": with_tensors(slopes=lambda each: each[:2]),
    "its seeds should be numbers below 64": with_tensors(seeds=lambda each: each.long() + 900),
    "it has another base": lambda m: Message(m.kind, m.round, m.client, "feedfeedfeedfeed", m.tensors).encoded(),
    "of version 9 of the protocol": lambda m: m.encoded().replace(b'"1|update', b'"9|update'),
    "that are no message of a federation": lambda m: m.encoded()[:50],
    "for round 7; this is round": lambda m: Message(m.kind, 7, m.client, m.base, m.tensors).encoded(),
}


@pytest.fixture(scope="module")
def place(files: Path) -> Workplace:
    return Workplace(read_federation(tiny(files)))


def test_what_cannot_be_an_update_is_refused(place: Workplace, tmp_path: Path) -> None:
    method = method_of(place)
    server, state = Server(place, method, Store.open(tmp_path / "s", {}), InProcess(place, method)), method.begin()
    ask = Message("train", 1, "ben", place.digest, method.down(state, 1, "ben")).encoded()
    answer = Client(place, method, "ben").answer(ask)
    server._check(1, "ben", answer, state)
    for said, change in FAULTS.items():
        with pytest.raises(GraftError, match=said):
            server._check(1, "ben", change(decoded(answer)), state)


def test_a_client_is_left_out_by_name_and_the_others_count_as_if_it_were_not_there(
    place: Workplace, tmp_path: Path
) -> None:
    method = method_of(place)
    heard: list[str] = []
    found = []
    for name, change in (
        ("nan", with_tensors(slopes=lambda each: each * float("nan"))),
        ("silent", lambda message: None),
    ):
        store, faulty = Store.open(tmp_path / name, {}), Faulty(place, method)
        faulty.changes = {"ben": change}
        Server(place, method, store, faulty, heard.append).run()
        assert [(each["round"], each["client"]) for each in store.left_out()] == [(1, "ben"), (2, "ben")]
        found.append(store.state()[1]["accumulators"])
    assert torch.equal(*found)
    assert any("round 1: client ben is left out: its slopes hold numbers that are NaN" in line for line in heard)
    assert any("round 2: client ben is left out: it sent nothing within 600 seconds" in line for line in heard)


def test_where_nobody_is_left_the_round_is_asked_again(place: Workplace, tmp_path: Path) -> None:
    method, store = method_of(place), Store.open(tmp_path / "s", {})
    faulty = Faulty(place, method)
    faulty.changes = dict.fromkeys(place.clients, lambda message: None)
    with pytest.raises(GraftError, match="no client is left in round 1(.|\n)*cleo: it sent nothing"):
        Server(place, method, store, faulty, lambda text: None).run()
    Server(place, method, store, InProcess(place, method), lambda text: None).run()
    assert store.state()[0] == 2 and not store.left_out()


def test_a_model_that_guesses_all_tokens_alike_has_diverged(place: Workplace, tmp_path: Path) -> None:
    method, store = method_of(place), Store.open(tmp_path / "s", {})
    server = Server(place, method, store, InProcess(place, method), lambda text: None)
    store.begin(method.begin(), {"ada": 9})
    store.close_round(0, method.begin(), {"loss": 4.0}, {}, 0.0)
    server._refuse_divergence(1, method.begin(), {"loss": 5.5})
    for loss in (math.log(258), 9.0, float("inf")):
        with pytest.raises(GraftError, match="the global model diverged in round 1.*lower local.lr"):
            server._refuse_divergence(1, method.begin(), {"loss": loss})


def test_a_client_of_another_base_or_other_settings_is_not_taken(files: Path, place: Workplace) -> None:
    hello = Message("hello", 0, "", place.digest).encoded()
    given = tiny(files)
    for changes, said in (
        ({"base": {**given["base"], "model": str(files / "other")}}, "it has another base"),
        ({"local": {**given["local"], "lr": 1e-3}}, "differ in local.lr"),
    ):
        other = Workplace(read_federation({**given, **changes}))
        client = Client(other, method_of(other), "ada")
        with pytest.raises(GraftError, match=said):
            read_card(decoded(client.answer(hello)), place)
    found = method_of(place)
    assert read_card(decoded(Client(place, found, "ada").answer(hello)), place) == 9
    problem = decoded(Client(place, found, "ada").answer(Message("train", 1, "ben", place.digest).encoded()))
    assert problem.kind == "problem" and "came to client 'ada'" in problem.text


def killed_at(statement: int, given: dict[str, Any], out: Path) -> None:
    """Run a federation in a process that is killed before this statement of its database."""
    plain, count = Storage.execute, 0

    def execute(self: Storage, *words: Any) -> Any:
        nonlocal count
        count += 1
        if count == statement:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *words)

    Storage.execute = execute  # type: ignore[method-assign]
    federate(given, (), out, resume=(out / FILE).exists())


def campaign(given: dict[str, Any], folder: Path, instants: range) -> None:
    torch.set_num_threads(1)
    federate(given, (), folder / "whole")
    context = multiprocessing.get_context("fork")
    for number in instants:
        out = folder / f"killed-{number}"
        codes = []
        for again in (number, 7):  # killed, gone on with and killed again
            child = context.Process(target=killed_at, args=(again, given, out))
            child.start()
            child.join(120)
            codes.append(child.exitcode)
        assert codes[0] == -signal.SIGKILL
        federate(given, (), out, resume=(out / FILE).exists())
        assert same(folder / "whole", out), f"killed at statement {number}"


def test_a_server_that_is_killed_goes_on_to_the_same_numbers(federation: dict[str, Any], tmp_path: Path) -> None:
    campaign({**federation, "fraction": 0.7}, tmp_path, range(23, 24))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedkseed-pro", "ferret", "fedavg", "local"])
def test_kills_at_every_third_statement(federation: dict[str, Any], tmp_path: Path, method: str) -> None:
    adapter = {} if method in ("fedkseed-pro", "ferret") else {"adapter": LORA}
    kind = {**federation["method"], "kind": method} if method == "fedkseed-pro" else method
    campaign({**federation, **adapter, "method": kind}, tmp_path, range(1, 46, 3))


def test_a_federation_is_run_shown_and_reported(
    federation: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    pytest.importorskip("rouge_score")
    monkeypatch.chdir(tmp_path)
    given = {
        **federation,
        "adapter": LORA,
        "method": {"kind": "fedavg", "rank": 2},
        "eval": {"answers": 3, "max_new_tokens": 3},
    }
    given["local"] = {"steps": 3, "batch_size": 2, "lr": 1e-3}
    Path("f.json").write_text(json.dumps(given))  # JSON is YAML
    graft_command("graft federate f.json --json")
    report = json.loads(capsys.readouterr().out)
    assert [row["round"] for row in report["rounds"]] == [0, 1, 2] and {"loss", "rougeL", "approximation error"} <= set(
        report["rounds"][2]
    )
    first, last = (next(row for row in report["rounds"] if row["round"] == number) for number in (0, 2))
    assert last["down"] > 0 and last["up"] > 0 and first["down"] == 0
    assert [each["client"] for each in report["clients"]] == ["ada", "ben", "cleo"]
    page = Path("runs/f/report.html").read_text()
    assert page.count("<svg") == 2 and "cleo" in page and "refresh" not in page
    assert "| round |" in Path("runs/f/report.md").read_text()
    assert Path("runs/f/adapters/federated/adapter_model.safetensors").is_file()
    graft_command("graft show runs/f")
    shown = capsys.readouterr().out
    assert "fedavg" in shown and "bytes of messages per client and round" in shown


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"method": {"kind": "fedkseed", "seedz": 3}}, "unknown key 'method.seedz'. Did you mean 'seeds'?"),
    "method": ({"method": "fedkseeds"}, "did you mean 'fedkseed'"),
    "seeds": ({"method": {"kind": "fedkseed", "seeds": 3}}, "method.seeds is 3, fewer than the 4 local.steps"),
    "block": ({"method": {"kind": "ferret", "block": 0}}, "method.block must be greater than or equal to 1"),
    "parts": ({"adapter": LORA, "method": {"kind": "ferret", "parts": "mlp"}}, "an adapter has no use with ferret"),
    "adapter": ({"method": "fedavg"}, "missing key 'adapter': method fedavg trains adapters"),
    "lr": ({"local": {"steps": 4, "lr": -1.0}}, "local.lr must be greater than 0"),
    "optimizer": ({"local": {"steps": 4, "lr": 1e-3, "optimizer": "lion"}}, "local.optimizer has no effect with method fedkseed"),
    "clients": ({"clients": {"split": "dirichlet"}}, "clients.split dirichlet needs clients.count"),
    "alpha": ({"clients": {"alpha": 0.5}}, "clients.alpha has no effect with clients.split files"),
    "label": ({"clients": {"split": "dirichlet", "count": 2, "label": "topics"}}, "has no column 'topics'. Did you mean 'topic'?"),
    "many": ({"clients": {"split": "dirichlet", "count": 30, "label": "topic"}}, "but data.train has only 30"),
    "unlike": ({"clients": {"adapters": [LORA]}}, "fedavg on differences alone can average"),
    "kinds": ({"adapter": {"kind": "prefix", "tokens": 2}, "method": {"kind": "fedavg", "aggregate": "differences"}}, "is no difference"),
    "rank": ({"adapter": LORA, "method": {"kind": "fedavg", "aggregate": "naive", "rank": 2}}, "method.rank is for averages"),
    "stack": ({"adapter": {**LORA, "kind": "dora"}, "method": {"kind": "fedavg", "aggregate": "stack"}}, "it cannot be stacked"),
    "answers": ({"data.validation": None, "eval": {"answers": 3}}, "eval.answers has no effect without validation data"),
    "diverges": ({"local": {"steps": 4, "batch_size": 2, "lr": 0.1}}, "Take a lower local.lr (it is 0.1)"),
    "rows": ({"data.max_length": 4, "data.overlong": "drop"}, "no token is left to train on"),
    "one": ({"data.max_length": 18, "data.overlong": "drop"}, "ben.jsonl: no row is left to train on for 1 client"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_on_a_line(federation: dict[str, Any], files: Path, tmp_path: Path, case: str) -> None:
    changes, said = BAD[case]
    given = json.loads(json.dumps(federation))
    if case == "one":
        long = [{"question": f"{a} and {a} and {a} and {a}?", "answer": str(a)} for a in range(3)]
        other = tmp_path / "ben.jsonl"
        other.write_text("".join(json.dumps(row) + "\n" for row in long))
        given["data"]["train"][1] = str(other)
    if case == "diverges":
        given["base"]["model"] = str(files / "calm")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        given[section] = {**given[section], name: value} if name else value
    with pytest.raises(GraftError) as error:
        federate(given, (), tmp_path / "out")
    assert said in str(error.value), str(error.value)
    assert (tmp_path / "out").exists() == (case == "diverges")  # else the folder may be named again


def test_a_folder_keeps_to_its_federation(federation: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    federate(federation, (), out)
    with pytest.raises(GraftError, match="already holds a federation"):
        federate(federation, (), out)
    with pytest.raises(GraftError, match="belongs to another federation, which differs in rounds"):
        federate(federation, ("rounds=3",), out, resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(GraftError, match="holds files that are not a federation"):
        federate(federation, (), tmp_path / "full")
