"""What does not go with a reversible base is named, with what does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.adapters.base import CannotFold
from graft.config import load_run
from graft.errors import GraftError
from graft.testing.bases import tiny_base
from graft.training.forward.anchors import prove_anchors
from graft.training.forward.causal import Forward
from tests.reversible.bases import tiny, tokens
from tests.reversible.test_gradients import LORA, randomise
from tests.training.conftest import attach, batcher, data, job_on


@pytest.mark.parametrize("family", ["t5", "gemma2", "bloom"])
def test_other_families_are_named_with_those_that_work(family: str) -> None:
    with pytest.raises(
        GraftError, match="cannot be made reversible; these can: llama, mistral, qwen2, qwen3, gpt2, opt, bert, roberta"
    ):
        graft.make_reversible(tiny_base(family), "meft1")


def test_a_base_with_cross_attention_is_refused() -> None:
    with pytest.raises(GraftError, match="cross-attention"):
        graft.make_reversible(tiny("bert", is_decoder=True, add_cross_attention=True), "meft1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_needs_anchors(dtype: torch.dtype) -> None:
    with pytest.raises(GraftError, match=f"{str(dtype).removeprefix('torch.')} needs anchors.*base.anchor_every: 3"):
        graft.make_reversible(tiny("llama", dtype=dtype), "meft1", anchor_every=None)


def test_wrong_arguments_and_models_are_named() -> None:
    model: Any = tiny("llama")
    unknown: Any = "meft11"
    with pytest.raises(GraftError, match="Did you mean 'meft1'"):
        graft.make_reversible(model, unknown)
    wrong: Any
    for wrong in (0, "3", 2.0, True):
        with pytest.raises(GraftError, match=f"anchor_every is {wrong!r}"):
            graft.make_reversible(model, "meft1", anchor_every=wrong)
    for wrong in (["meft1"], None):
        with pytest.raises(GraftError, match="unknown reversible coupling"):
            graft.make_reversible(model, wrong)
    graft.make_reversible(model, "meft1")
    with pytest.raises(GraftError, match="reversible already"):
        graft.make_reversible(model, "meft2")
    with pytest.raises(GraftError, match="this model has adapters"):
        graft.make_reversible(attach(tiny("llama")), "meft1")


def test_the_site_stream_is_named_on_bases_without_it() -> None:
    for model in (tiny("llama"), graft.make_reversible(tiny("llama"), "meft3")):
        with pytest.raises(GraftError, match="coupling meft1 or meft2, and this base has none: set base.reversible"):
            graft.attach(model, {"a": "papers/meft1"})
    with pytest.raises(GraftError, match="'stream' is a stream site"):
        graft.attach(graft.make_reversible(tiny("llama"), "meft2"), {"a": {"kind": "series", "sites": "stream"}})
    with pytest.raises(GraftError, match="site 'layer' matches nothing"):
        graft.attach(graft.make_reversible(tiny("llama"), "meft3"), {"a": {"kind": "series", "sites": "layer"}})


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_virtual_tokens_in_the_embedding_are_refused(kind: str) -> None:
    model = graft.make_reversible(tiny("llama"), "meft1")
    with pytest.raises(GraftError, match=f"kind '{kind}' does not train on a reversible base"):
        graft.attach(model, {"a": {"kind": kind, "tokens": 2}})
    assert graft.names(model) == ()


def test_merging_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    model = attach(graft.make_reversible(tiny("llama"), "meft1"))
    with pytest.raises(CannotFold, match="reversible base .meft1. cannot be merged"):
        graft.merge(model, "a")
    with pytest.raises(GraftError, match="cannot be written for another library"):
        graft.export(model, "a", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_checkpointing_and_compiling_are_refused() -> None:
    model = attach(graft.make_reversible(tiny("llama"), "meft1"))
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="reversible base cannot be compiled"):
        compiled(tokens(), use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with pytest.raises(GraftError, match="gradient checkpointing has no effect on a reversible base"):
        model(tokens(), use_cache=False)


def test_a_block_that_is_skipped_is_named() -> None:
    model = tiny("opt", 4, layerdrop=1.0)
    graft.make_reversible(model, "meft1")
    hidden = torch.zeros(1, 3, 32)
    with pytest.raises(GraftError, match="block 1 of a reversible base did not get the output of block 0"):
        model.model.decoder.layers[1](hidden)
    model.model.decoder.layerdrop = 0.5
    torch.manual_seed(1)  # skips a block after the first
    with pytest.raises(GraftError, match="skipped a block"):
        model.train()(tokens())


def settings(**changes: Any) -> dict[str, Any]:
    base = {"model": "some/base", "reversible": "meft1", **changes.pop("base", {})}
    return {"base": base, "adapter": {"kind": "lora"}, "data": {"train": "a.json"}, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"activations": {"0": "recompute"}}}, "activations has no effect with base.reversible"),
        ({"train": {"compile": True}}, "train.compile does not go with base.reversible"),
        ({"base": {"reversible": None, "anchor_every": 4}}, "anchor_every has no effect without base.reversible"),
        ({"train": {"method": "mezo"}}, "train.method mezo has no backward pass, so base.reversible saves nothing"),
        ({"base": {"reversible": "meft4"}}, "meft1"),
        ({"base": {"anchor_every": 0}}, "anchor_every"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(GraftError, match=said):
        load_run(settings(**changes))


def test_too_few_anchors_for_exact_gradients_are_an_error() -> None:
    """A hundredfold a block or more, the rounding error of float64 reaches what the blocks read."""
    model = tiny("llama", 10, vocab_size=97)
    graft.make_reversible(model, "meft3", anchor_every=None)
    graft.attach(model, {"a": LORA})
    randomise(model, scale=0.3)
    forward, job = Forward(model), job_on(model, train=data(8))
    with pytest.raises(GraftError, match="base.anchor_every is null: the gradients of the first batch are off by"):
        prove_anchors(forward, [job], batcher())
    good = graft.make_reversible(tiny("llama", 10, vocab_size=97), "meft3", anchor_every=2)
    graft.attach(good, {"a": LORA})
    randomise(good, scale=0.3)
    apart = prove_anchors(Forward(good), [job_on(good, train=data(8))], batcher())
    assert apart is not None and apart < 1e-3
    assert prove_anchors(Forward(attach(tiny("llama"))), [], batcher()) is None
