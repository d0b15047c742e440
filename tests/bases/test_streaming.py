"""`base.offload: host`: blocks that stream from host memory give what blocks that stay give, to the last bit, and less is held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import graft
from graft.bases import load_base
from graft.config import load_run
from graft.config.base import BaseConfig
from graft.distributed.sharded import own_part, streamed
from graft.errors import GraftError
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Request
from graft.training import train
from tests.runs_at_hand import write_rows
from tests.small import save_small

KINDS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.2},
    "dora": {"kind": "dora", "rank": 2, "sites": "attn.q mlp.down"},
    "pissa": {"kind": "pissa", "rank": 2, "sites": "attn.v"},
    "series": {"kind": "series", "bottleneck": 4},
    "prefix": {"kind": "prefix", "tokens": 2},
    "prompt": {"kind": "prompt", "tokens": 3},
    "adapter-v2": {"kind": "llama-adapter-v2"},
    "ia3": {"kind": "ia3"},
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose files are in bfloat16, and data beside it."""
    folder = tmp_path_factory.mktemp("bases") / "narrow"
    save_small(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    write_rows(folder.parent / "data.jsonl", [{"question": f"{n} and {n}?", "answer": str(2 * n)} for n in range(16)])
    return folder


def trained(model: Path, out: Path, kinds: dict[str, Any], **more: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses, and the tensors of all adapters, of a run of these jobs."""
    settings, train_settings = more.pop("base", {}), {"steps": 4, "batch_size": 4, "lr": 1e-2, **more}
    config = load_run(
        {
            "base": {"model": str(model), "device": "cpu", **settings},
            "data": {"train": str(model.parent / "data.jsonl"), "template": "plain", "validation": 2},
            "train": train_settings,
            "jobs": {name: {"adapter": kind} for name, kind in kinds.items()},
        }
    )
    train(config, out, quiet=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = sorted((out / "adapters").glob("*/adapter_model.safetensors"))
    weights = {f"{path.parent.name} {name}": each for path in files for name, each in load_file(path).items()}
    return [line.get("loss", line.get("validation_loss")) for line in lines], weights


def assert_alike(narrow: Path, folder: Path, kinds: dict[str, Any], **more: Any) -> None:
    """Blocks that stream train these kinds as blocks that stay."""
    losses, weights = trained(narrow, folder / "stays", kinds, **more)
    others, given = trained(narrow, folder / "streams", kinds, **more, base={"offload": "host"})
    assert others == losses and given.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(given[name], tensor), name


def test_a_run_on_blocks_that_stream_is_the_same_to_the_last_bit(narrow: Path, tmp_path: Path) -> None:
    assert_alike(narrow, tmp_path, {name: KINDS[name] for name in ("lora", "dora", "prompt")}, activations="recompute")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"activations": "recompute"}, {"layout": "padded"}], ids=str)
def test_every_hook_on_blocks_that_stream(narrow: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_alike(narrow, tmp_path, KINDS, **settings)


def test_what_is_held_is_what_is_said_and_answers_are_the_same(narrow: Path) -> None:
    whole = load_base(BaseConfig(model=str(narrow), device="cpu"))
    base = load_base(BaseConfig(model=str(narrow), device="cpu", offload="host"))
    said = streamed(base.model)
    assert said is not None and said.blocks == len(base.model.model.layers)
    inside = [own_part(each) for layer in base.model.model.layers for each in layer.parameters()]
    assert {each.dtype for each in inside} == {torch.bfloat16}
    numbers = sum(each.numel() for each in inside)
    assert said.held == 2 * numbers and said.at_once == 2 * 4 * numbers // said.blocks
    assert base.dtype == torch.float32 and str(base.identity["digest"]) == str(whole.identity["digest"])
    requests = [Request((5, 6, 7, 8)), Request((9, 4))]
    one, other = (dict(generate(each.model, requests, Decoding(6))) for each in (whole, base))
    assert one == other


def test_four_bits_stream_too(narrow: Path) -> None:
    """On a CPU the setting is refused there, since it saves nothing: the same call as on a GPU, for its results."""
    from graft.distributed.sharded import stream

    pytest.importorskip("bitsandbytes")
    losses = []
    for streams in (False, True):
        base = load_base(BaseConfig(model=str(narrow), device="cpu", quantize="nf4"))
        if streams:
            stream(base.model, base.device, base.dtype)
        torch.manual_seed(0)
        graft.attach(base.model, {"a": graft.LoRA(rank=2, sites="linear")})
        for _, parameter in graft.parameters(base.model, "a"):
            torch.nn.init.normal_(parameter, std=0.1)
        ids = torch.arange(4, 20)[None]
        logits = base.model(ids, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        gradients = [parameter.grad for _, parameter in graft.parameters(base.model, "a")]
        losses.append([logits, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "bfloat16"}, "in bfloat16, the number format of the computation, already, so nothing would be saved"),
        ({"quantize": "nf4"}, "are quantised already"),
        ({"quantize": "int8"}, "takes a base in full precision or nf4"),
        ({"reversible": "meft1"}, "does not go with base.reversible"),
    ],
)  # fmt: skip
def test_what_would_save_nothing_is_refused(narrow: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_base(BaseConfig(model=str(narrow), device="cpu", offload="host", **settings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"method": "full"}}, "train.method full"),
        ({"train": {"compile": True}}, "train.compile"),
    ],
)
def test_what_does_not_go_with_it_is_named(narrow: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    settings = {
        "base": {"model": str(narrow), "device": "cpu", "offload": "host"},
        "data": {"train": str(narrow.parent / "data.jsonl"), "template": "plain"},
        "train": {"steps": 1, **change["train"]},
        **({} if change["train"].get("method") else {"adapter": "lora"}),
    }
    with pytest.raises(GraftError, match=f"base.offload.*{said}"):
        train(load_run(settings), tmp_path / "run", quiet=True)


def test_a_base_that_streams_is_not_merged_into(narrow: Path) -> None:
    base = load_base(BaseConfig(model=str(narrow), device="cpu", offload="host"))
    graft.attach(base.model, {"a": graft.LoRA(rank=2, sites="attn.q")})
    with pytest.raises(GraftError, match="whole base"):
        graft.merge(base.model, "a")
