"""graft check --server finds and names each fault that is planted in a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import graft
from graft.cli import main
from graft.data.builtin_templates import ALPACA, PLAIN
from tests.serving.stand_in import StandIn
from tests.small import small_model, small_tokenizer

LORA = {"kind": "lora", "rank": 4, "alpha": 16, "sites": "attn.q attn.v mlp.down"}
FAULTS = {
    "none": None, "no-chat": None, "not-applied": "not-applied", "half-site": "half-applied", "half-layers": "half-applied",
    "scale": "wrong-scale", "no-alpha": "wrong-scale", "another-base": "another-base", "stale": "stale-cache",
    "template": "template", "bos-twice": "bos-twice", "bos-missing": "bos-missing", "chat-bos": "bos-twice",
    "merged-twice": "merged-twice", "merged-into-base": "merged-into-base", "other": "another-adapter", "noise": "unsteady",
}  # fmt: skip

QUICK = ("none", "half-site", "scale", "stale", "chat-bos")
CASES = [pytest.param(fault, marks=[] if fault in QUICK else [pytest.mark.slow]) for fault in FAULTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose tokenizer writes BOS, and an adapter that is asked with the alpaca template."""
    base, adapter = tmp_path_factory.mktemp("check") / "base", tmp_path_factory.mktemp("check") / "tuned"
    model, tokenizer = small_model(scale=3.0), small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    graft.attach(model, {"a": LORA})
    randomise(model, "a", 1)
    graft.save(model, "a", adapter)
    ALPACA.save(adapter)
    return base, adapter


def randomise(model: Any, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in graft.parameters(model, name):
            parameter.normal_(std=0.15)


@pytest.fixture(scope="module")
def right(folders: tuple[Path, Path]) -> Any:
    """The model of the stand-in: the adapter, the adapter without some of its parts, and another adapter."""
    model = small_model(scale=3.0)
    graft.load(model, folders[1], name="a")
    for name, gone in (("half-site", "mlp.down_proj"), ("half-layers", "layers.1.")):
        graft.load(model, folders[1], name=name)
        with torch.no_grad():
            for key, parameter in graft.parameters(model, name):
                parameter.mul_(0.0 if gone in key else 1.0)
    graft.attach(model, {"other": LORA})
    randomise(model, "other", 2)
    return model


def asked(capsys: pytest.CaptureFixture[str], url: str, folders: tuple[Path, Path], *more: str) -> tuple[int, Any]:
    words = ["check", "--server", url, "--adapter", str(folders[1]), "--base", str(folders[0]), "--json", *more]
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("fault", CASES)
def test_a_planted_fault_is_found_and_named(
    fault: str, right: Any, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    model = right
    if fault == "another-base":
        model = small_model(scale=3.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
        graft.load(model, folders[1], name="a", any_base=True)
    server = StandIn(model, tokenizer, PLAIN if fault == "template" else ALPACA, fault)
    code, found = asked(capsys, server.url, folders)
    server.stop()
    assert [each["fault"] for each in found["faults"]] == ([FAULTS[fault]] if FAULTS[fault] else []), found
    assert code == (2 if FAULTS[fault] else 0)
    said = " ".join([*(each["message"] for each in found["faults"]), *found["notes"]])
    words = {"half-site": "mlp.down", "half-layers": "layers from 1 on", "scale": "0.5 times", "no-alpha": "0.25 times",
             "template": "plain template", "no-chat": "chat was not compared"}  # fmt: skip
    assert words.get(fault, "") in said


def test_servers_that_say_too_little_and_names_that_are_not_there_are_errors(
    right: Any, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server = StandIn(right, small_tokenizer(), ALPACA, "no-echo")
    for more, said in (((), "gives no log-probabilities"), (("--model", "nobody"), "has no model 'nobody'")):
        code, found = asked(capsys, server.url, folders, *more)
        assert code == 2 and said in found["error"]["message"]
    server.stop()
    code, found = asked(capsys, server.url, (folders[0], Path("nowhere")))
    assert code == 2 and "there is no folder nowhere" in found["error"]["message"]
    code, found = asked(capsys, server.url, folders)
    assert code == 2 and "does not answer" in found["error"]["message"]
    with pytest.raises(SystemExit):
        main(["check", "run.yaml", "--adapter", "a", "--json"])
    assert "no effect without --server" in capsys.readouterr().out
