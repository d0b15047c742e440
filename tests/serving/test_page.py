"""The commands of docs/serving.md, and what graft serve refuses to start with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from graft.cli import main
from tests.conftest import ROOT
from tests.runs_at_hand import make_run
from tests.serving.conftest import Running
from tests.walk import commands_of, graft_command

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `graft serve` return as soon as it listens; the servers are in the list, and end with the test."""
    servers: list[Running] = []
    monkeypatch.setattr("graft.serving.listening.listen", lambda app, *_: servers.append(Running(app)))
    yield servers
    for each in servers:
        each.stop()


def test_the_page_runs_from_top_to_bottom(at_home: Path, listening: list[Running]) -> None:
    Path("runs").mkdir()
    kinds: dict[str, Any] = {"lora": {"kind": "lora", "sites": "attn.q"}, "series": {"kind": "series", "bottleneck": 4}}
    make_run(Path("runs/math"), kinds, scale=3.0)
    whole, by_folder, check, pages = commands_of(PAGE)
    graft_command(whole)
    graft_command(by_folder.replace("seedling", "runs/math-base"))
    graft_command(check.replace("http://127.0.0.1:8000", listening[0].url))
    graft_command(pages)
    for each in listening[:2]:
        assert [each.name for each in each.app.state.served.adapters.all] == ["lora", "series"]
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    client = openai.OpenAI(base_url=f"{listening[1].url}/v1", api_key="none")
    example = {"messages": [{"role": "user", "content": "What is 17 plus 25?"}], "max_tokens": 3}
    for name in ("lora", "lora+0.5*series"):
        assert client.chat.completions.create(model=name, **example).usage.completion_tokens <= 3


def test_what_a_server_does_not_start_with_is_named(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("run"), {"lora": {"kind": "lora", "sites": "attn.q"}})
    open_, short, good = Path("open"), Path("short"), Path("good")
    for path, text, mode in ((open_, "x" * 32, 0o644), (short, "abc", 0o600), (good, "x" * 32, 0o600)):
        path.write_text(text)
        path.chmod(mode)
    for words, said in (
        (("--host", "0.0.0.0"), "give a token with --token-file"),
        (("--token-file", "open"), "mode 644"),
        (("--token-file", "short"), "at least 16"),
        (("--token-file", "nothing"), "no token file"),
        (("--adapters", "nowhere"), "no folder nowhere"),
        (("--adapters", "run/adapters/lora"), "is an adapter, and no folder of adapters"),
        (("--token-file", "good", "--host", "203.0.113.9"), "cannot listen at 203.0.113.9"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "run", "--port", "0", *words])
        assert ended.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split()), words


def test_a_folder_that_another_process_serves_is_named_before_anyone_listens(
    at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("google.protobuf", reason="the extra 'serve' is not installed")
    make_run(Path("run"), {"lora": {"kind": "lora", "sites": "attn.q"}})
    Path("state").mkdir()
    with FileLock("state/.lock"), pytest.raises(SystemExit) as ended:
        main(["serve", "run", "--port", "0", "--state", "state"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "another process serves state" in said
    assert "Traceback" not in said and "http://" not in said
