"""The pages of runs: what they show, what they escape, what they refuse, and that they follow a run while it trains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from graft.cli import main
from graft.runs.folder import RunFolder
from graft.utils.jsonl import JsonLines
from tests.cli.test_compare import evaluation
from tests.runs_at_hand import make_run
from tests.serving.conftest import TOKEN, Running

httpx = pytest.importorskip("httpx", reason="the HTTP client 'httpx' is not installed")
EVIL = "<script>alert(1)</script>"


class Checked(HTMLParser):
    """Every tag is closed, every field has a label, nothing is loaded from elsewhere."""

    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        for address in (values.get("src"), values.get("href") if tag != "a" else None, values.get("action")):
            assert address is None or re.match(r"/(?!/)|#|data:", address), (tag, address)
        if tag in ("input", "textarea") and values.get("type") != "hidden":
            assert "label" in self.open or values.get("aria-label"), values
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with losses, samples and evaluations on the same questions, a damaged one, and a study with a report."""
    root = tmp_path_factory.mktemp("shelf") / "runs"
    root.mkdir()
    outside = root.parent / "outside"
    outside.mkdir()
    for name in ("a run", "b"):
        make_run(root / name, {"lora": {"kind": "lora", "sites": "attn.q"}})
        run = RunFolder(root / name)
        run.status(
            {
                "state": "running",
                "step": 3,
                "jobs": {"default": {"state": "running", "step": 3, "steps": 9, "loss": 1.5}},
            }
        )
        for step in (1, 2, 3):
            run.metrics.append({"job": "default", "job_step": step, "step": step, "loss": 3.0 / step})
        pieces = [["<s>2 plus 2? ", "read"], [f"4 {EVIL}", "learnt"]]
        run.samples.append(
            {
                "job": "default",
                "source": "x.json",
                "row": 1,
                "text": "t",
                "trained_on": "4",
                "tokens": 9,
                "targets": 2,
                "pieces": pieces,
            }
        )
    for part in ("adapters", "checkpoints", "eval"):
        (root / "broken" / part).mkdir(parents=True)
    (root / "broken" / "config.yaml").write_text("base: [")
    (root / "broken" / "status.json").write_text("{")
    (root / "study").mkdir()
    (root / "study" / "study.json").write_text("{}")
    (root / "study" / "report.html").write_text("<!doctype html><html><body>the ranking</body></html>")
    return root


@pytest.fixture(scope="module")
def pages(shelf: Path) -> Iterator[Running]:
    from graft.serving.app import make_pages

    server = Running(make_pages(shelf))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def guarded(shelf: Path) -> Iterator[Running]:
    from graft.serving.app import make_pages

    server = Running(make_pages(shelf, token=TOKEN))
    yield server
    server.stop()


def page(running: Running, path: str, status: int = 200, **options: Any) -> str:
    found = httpx.get(running.url + path, follow_redirects=True, timeout=30, **options)
    assert found.status_code == status, found.text
    Checked(found.text)
    return found.text


def test_runs_studies_and_damage_are_listed(pages: Running) -> None:
    text = page(pages, "/")
    assert 'href="/run/a%20run"' in text and "damaged" in text and "killed" in text and "/study/study" in text
    assert "Compare the chosen" not in text  # none has been evaluated
    assert "the ranking" in page(pages, "/study/study") and "No run has been evaluated yet" in page(pages, "/compare")


def test_a_run_shows_its_curve_its_jobs_and_its_samples_and_escapes_them(pages: Running) -> None:
    found = httpx.get(f"{pages.url}/run/a run", timeout=30)
    assert found.status_code == 200 and "default-src 'self'" in found.headers["content-security-policy"]
    assert "3/9" in found.text and "1.5" in found.text and 'data-live="/live/a%20run"' in found.text
    assert (
        '<span class="read">&lt;s&gt;2 plus 2? </span><mark class="learnt">4 &lt;script&gt;' in found.text
        and EVIL not in found.text
    )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "graft-llm[report]" in found.text
    else:
        assert "<svg" in found.text


def test_the_live_part_comes_again_when_the_run_writes(pages: Running, shelf: Path) -> None:
    with httpx.Client(timeout=30) as client, client.stream("GET", f"{pages.url}/live/b") as response:
        lines = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        assert "3/9" in json.loads(next(lines))
        JsonLines(shelf / "b" / "metrics.jsonl").append({"job": "default", "job_step": 4, "step": 4, "loss": 0.123})
        assert "0.123" in json.loads(next(lines))


@pytest.mark.parametrize("name", ["nothing", "../outside", "..%2f..", "broken", "/etc", "study", "%00"])
def test_what_is_no_run_or_lies_outside_is_not_shown(pages: Running, name: str) -> None:
    found = httpx.get(f"{pages.url}/run/{name}", timeout=30)
    assert found.status_code in (400, 404) and "Traceback" not in found.text
    if name != "broken":  # which may be mended while the page is open
        assert httpx.get(f"{pages.url}/live/{name}", timeout=30).status_code in (400, 404)


def test_pages_without_a_token_act_on_nothing(pages: Running, shelf: Path) -> None:
    found = httpx.post(f"{pages.url}/do/resume", data={"run": "b"})
    assert found.status_code == 403 and "--token-file" in found.text and "/do/" not in page(pages, "/run/b")
    assert not (shelf / "b.log").exists()


def test_whoever_signs_in_sees_the_pages_and_acts(guarded: Running, shelf: Path) -> None:
    assert "Sign in" in page(guarded, "/runs", headers={"Accept": "text/html"})
    assert httpx.get(f"{guarded.url}/runs").status_code == 401
    assert httpx.post(f"{guarded.url}/do/cancel", data={"run": "b", "job": "default"}).status_code == 401
    with httpx.Client(base_url=guarded.url, timeout=100) as client:
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
        assert client.post("/login", data={"token": TOKEN}).status_code == 303
        assert TOKEN not in str(client.cookies) and "Go on with this run" in client.get("/run/b").text
        for what, form, said in (
            ("start", {"run": "../x", "text": "a: 1"}, "a name has letters"),
            ("start", {"run": "b", "text": "a: 1"}, "is there already"),
            ("submit", {"run": "nothing", "job": "j", "text": ""}, "no folder nothing"),
            ("fly", {"run": "b"}, "no action fly"),
        ):
            found = client.post(f"/do/{what}", data=form)
            assert found.status_code in (400, 404) and said in found.text, found.text
        assert (
            client.post(
                "/do/cancel", data={"run": "b", "job": "x"}, headers={"Origin": "http://evil.example"}
            ).status_code
            == 403
        )


@pytest.mark.slow
def test_a_job_is_cancelled_from_the_pages_as_by_the_command(guarded: Running, shelf: Path) -> None:
    with httpx.Client(base_url=guarded.url, timeout=100, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        assert "has no job &#39;nobody&#39;" in client.post("/do/cancel", data={"run": "b", "job": "nobody"}).text
        assert "takes effect" in client.post("/do/cancel", data={"run": "b", "job": "default"}).text
        found = client.post("/do/submit", data={"run": "b", "job": "late", "text": "adapter: {rank: x}"})
        assert found.status_code == 400 and "rank" in found.text and not (shelf / "b-late.yaml").exists()
    orders = [json.loads(path.read_text()) for path in (shelf / "b" / "jobs" / "inbox").glob("*.json")]
    assert [(order["do"], order["job"]) for order in orders] == [("cancel", "default")]


def test_a_server_shows_the_chat_and_its_load(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=30, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        text = client.get("/", follow_redirects=True).text
        Checked(text)
        assert all(f'value="{name}"' in text for name in ("base", "style", "task", "lead"))
        with client.stream("GET", "/load") as response:
            assert "running" in next(line for line in response.iter_lines() if line.startswith("data: "))
        script = client.get("/static/pages.js").text
        assert "/v1/chat/completions" in script and "http" not in script.replace("https", "http")


def test_evaluations_are_compared_with_intervals(shelf: Path, pages: Running) -> None:
    for name, right in (("c", "111100"), ("d", "111111"), ("e", "100000")):
        RunFolder(evaluation(shelf / name, right)).status({"state": "finished"})
    assert "Compare the chosen" in page(pages, "/")
    text = page(pages, "/compare", params={"run": ["c", "d"]})
    assert "0.3333" in text and " to " in text
    assert "66.7%" in page(pages, "/run/c") and "p (Holm)" in page(pages, "/compare", params={"run": ["c", "d", "e"]})
    assert 'role="alert"' in page(pages, "/compare", params={"run": ["b", "c"]})


def test_the_verb_shows_a_folder(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    servers: list[Running] = []
    monkeypatch.setattr("graft.serving.listening.listen", lambda app, *_: servers.append(Running(app)))
    with pytest.raises(SystemExit) as ended:
        main(["ui", str(shelf)])
    assert ended.value.code in (0, None) and "a run" in page(servers[0], "/")
    servers[0].stop()
    with pytest.raises(SystemExit):
        main(["ui", str(shelf / "nothing")])
    assert "there is no folder" in capsys.readouterr().err
