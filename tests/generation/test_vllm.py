"""The engine vLLM, against a stand-in of the same call surface: transformers and PEFT answer in it, one prompt at a time.

vLLM itself needs a GPU and is not installed here: these tests say what Graft asks of it, not what it answers.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from graft.cli import build
from graft.errors import GraftError, MissingExtra
from graft.generation.loaded import LoadedModel, load_candidates
from graft.generation.requests import Decoding, Request
from tests.runs_at_hand import make_run

LORA = {"kind": "lora", "rank": 3, "alpha": 6, "sites": "attn.q mlp.down"}
ROWS = [{"instruction": f"What is {n} plus 2?", "input": "", "output": "", "answer": str(n + 2.0)} for n in range(3)]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    seed: int | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """Loads what it is pointed at, as vLLM would."""

    made: list[dict[str, Any]] = []

    def __init__(self, model: str, *, dtype: str = "auto", skip_tokenizer_init: bool = False, **lora: Any) -> None:
        assert set(lora) <= {"enable_lora", "max_loras", "max_lora_rank"}
        self.made.append({"model": model, "dtype": dtype, "skip_tokenizer_init": skip_tokenizer_init, **lora})
        self.model, self.dtype = model, getattr(torch, dtype)

    def generate(
        self, prompts: Any, sampling_params: Any, *, use_tqdm: bool = True, lora_request: LoRARequest | None = None
    ) -> list[Any]:
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype)
        if lora_request is not None:
            assert lora_request.lora_int_id > 0
            model = peft.PeftModel.from_pretrained(model, lora_request.lora_path).eval()
        return [self._one(model, prompt, params) for prompt, params in zip(prompts, sampling_params, strict=True)]

    def _one(self, model: Any, prompt: dict[str, list[int]], params: SamplingParams) -> Any:
        assert params.temperature == 0 and params.ignore_eos and not params.detokenize
        ids = torch.tensor([prompt["prompt_token_ids"]])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=params.max_tokens,
            eos_token_id=params.stop_token_ids or None, pad_token_id=0,
        )  # fmt: skip
        tokens = out[0, ids.shape[1] :].tolist()
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens, finish_reason="length")])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vllm, vllm.lora and vllm.lora.request."""
    LLM.made.clear()
    top, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vars(top).update(LLM=LLM, SamplingParams=SamplingParams, __version__="0.0")
    vars(request).update(LoRARequest=LoRARequest)
    for module in (top, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def loaded_with(tmp_path: Path, **adapters: Any) -> LoadedModel:
    return load_candidates(make_run(tmp_path / "run", adapters, context=256))


def asked(adapters: list[str | None]) -> list[Request]:
    draw = torch.Generator().manual_seed(3)
    lengths = (5, 40, 250, 256)
    ids = [tuple(torch.randint(2, 258, (length,), generator=draw).tolist()) for length in lengths]
    return [Request(one, adapter, frozenset({7, 30, 99})) for adapter in adapters for one in ids]


def test_base_and_loras_answer_as_in_graft_and_prompts_without_room_are_not_asked(vllm: None, tmp_path: Path) -> None:
    from graft.generation.vllm import VLLM

    loaded = loaded_with(tmp_path, small=LORA, wide={**LORA, "rank": 20, "sites": "attn.q attn.v"})
    engine, requests = VLLM(loaded), asked([None, "small", "wide"])
    found = dict(engine.answers(requests, Decoding(12), 10**6))
    assert found == dict(loaded.active_engine.answers(requests, Decoding(12), 10**6))
    assert {answer.reason for answer in found.values()} == {"stopped", "truncated", "no_room"}
    assert engine.name == "vllm 0.0" and engine.check(requests, 1) == 0
    [made] = LLM.made
    assert Path(made["model"]) == tmp_path / "run-base" and made["dtype"] == "float32"
    assert (made["enable_lora"], made["max_lora_rank"]) == (True, 32)


def test_a_base_without_adapters_asks_for_no_room_for_loras(vllm: None, tmp_path: Path) -> None:
    from graft.config.base import BaseConfig
    from graft.generation.vllm import VLLM

    make_run(tmp_path / "run", {"lora": LORA})
    VLLM(load_candidates(None, BaseConfig(model=str(tmp_path / "run-base"), device="cpu")))
    assert "enable_lora" not in LLM.made[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"kind": "series", "bottleneck": 4},
            "'odd' is of kind series, but vLLM serves no kind of adapter other than LoRA.*leave out --engine vllm",
        ),
        (
            {"kind": "prefix", "tokens": 2},
            "'odd' is of kind prefix, but vLLM serves no kind of adapter other than LoRA.*leave out --engine vllm",
        ),
        ({"kind": "full", "sites": "attn.q"}, "'odd' is of kind full.*merge it first .graft merge"),
        ({**LORA, "train_bias": True}, "'odd' has LoRA biases, which vLLM cannot serve; merge it first"),
        ([LORA, {**LORA, "rank": 5, "sites": "attn.v"}], "'odd' has LoRAs of several ranks.*merge it first"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_with_the_reason_and_a_way_out(
    vllm: None, tmp_path: Path, config: Any, message: str
) -> None:
    from graft.generation.vllm import VLLM

    with pytest.raises(GraftError, match=message):
        VLLM(loaded_with(tmp_path, odd=config))
    assert not LLM.made, "an engine is not started in vain"


def test_beams_are_refused_since_vllm_searches_by_other_rules(vllm: None, tmp_path: Path) -> None:
    from graft.generation.vllm import VLLM

    engine = VLLM(loaded_with(tmp_path, lora=LORA))
    with pytest.raises(GraftError, match="vLLM's beam search is not the one that this protocol names"):
        list(engine.answers(asked([None]), Decoding(4, beams=4), 1))


def test_graft_eval_writes_the_answers_of_vllm_and_keeps_them_apart_from_its_own(vllm: None, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"lora": LORA}, context=400)
    (tmp_path / "SVAMP").mkdir()
    (tmp_path / "SVAMP" / "test.json").write_text(json.dumps(ROWS))
    words = [
        "eval",
        run,
        "--tasks",
        "SVAMP",
        "--protocol",
        "strict",
        "--data",
        tmp_path,
        "--dtype",
        "float32",
        "--json",
    ]
    own, other = (
        json.loads(invoke(*words, "--out", tmp_path / engine, "--engine", engine).stdout)["tasks"][0]
        for engine in ("graft", "vllm")
    )
    assert (own["engine"], other["engine"]) == ("graft", "vllm 0.0")
    answers = [sorted((Path(one["folder"]) / "answers.jsonl").read_text().splitlines()) for one in (own, other)]
    assert answers[0] == answers[1]
    answer = invoke(*words, "--out", tmp_path / "graft", "--engine", "vllm")
    assert isinstance(answer.exception, GraftError) and "belongs to another engine: graft, now vllm 0.0" in str(
        answer.exception
    )


def test_number_formats_are_those_of_a_gpu_unless_they_are_named(tmp_path: Path) -> None:
    from graft.cli.eval import _dtype_for_vllm

    run = make_run(tmp_path / "run", {"lora": LORA})
    assert [_dtype_for_vllm(where, named) for where in (None, run) for named in (None, "auto", "float32")] == [
        "bfloat16", "bfloat16", "float32",
    ] * 2  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "rows.jsonl"], "--engine vllm generates answers to benchmarks"),
        (["--tasks", "ARC-Easy", "--protocol", "rank"], "--engine vllm generates answers to benchmarks"),
        (["--tasks", "SVAMP", "--cache", "static"], "--cache and --device have no effect with --engine vllm"),
    ],
)
def test_what_would_have_no_effect_with_vllm_is_refused(vllm: None, words: list[str], message: str) -> None:
    answer = invoke("eval", "--base", "seedling", "--engine", "vllm", *words)
    assert isinstance(answer.exception, GraftError) and message in str(answer.exception)


def test_without_vllm_the_extra_is_named() -> None:
    answer = invoke("eval", "--base", "seedling", "--engine", "vllm", "--tasks", "SVAMP")
    assert isinstance(answer.exception, MissingExtra) and "graft-llm[vllm]" in str(answer.exception)


def test_a_cache_changes_the_speed_and_not_the_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"lora": LORA}, context=400)
    (tmp_path / "SVAMP").mkdir()
    (tmp_path / "SVAMP" / "test.json").write_text(json.dumps(ROWS))
    words = ["eval", run, "--tasks", "SVAMP", "--protocol", "strict", "--data", tmp_path, "--json"]
    results = [
        json.loads(invoke(*words, "--out", tmp_path / cache, "--cache", cache).stdout)["tasks"][0]
        for cache in ("dynamic", "static")
    ]
    lines = [sorted((Path(one["folder"]) / "answers.jsonl").read_text().splitlines()) for one in results]
    assert lines[0] == lines[1] and results[1]["self_checked"] > 0


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(build(), list(map(str, words)))
