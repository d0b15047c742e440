"""Defects of PEFT 0.21 and AdapterHub's adapters 1.3, each as a test of the same name that Graft passes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import graft
from tests.contract.table import base, ids, logits, loss, pristine, randomise, same_base, with_adapters

KINDS: dict[str, Any] = {
    "ia3": graft.IA3(), "vera": graft.VeRA(rank=4), "loha": graft.LoHa(rank=2), "lokr": graft.LoKr(rank=2), "dora": graft.DoRA(rank=2),
    "series": graft.Series(bottleneck=4), "prefix": graft.Prefix(tokens=3), "prompt": graft.PromptTuning(tokens=3),
    "reft": graft.ReFT(rank=2), "full": graft.Full(sites="norm"), "compacter": graft.Compacter(bottleneck=8),
}  # fmt: skip


# PEFT


@pytest.mark.parametrize("kind", KINDS)
def test_peft_1_a_mixed_batch_gives_each_row_its_own_adapter(kind: str) -> None:
    model, inputs = with_adapters("llama", a=KINDS[kind], b=KINDS[kind]), ids(3)
    with graft.route(model, ["a", None, "b"]):
        mixed = logits(model, inputs)
    for row, name in enumerate(("a", None, "b")):
        with graft.use(model, name):
            torch.testing.assert_close(mixed[row : row + 1], logits(model, inputs[row : row + 1]), atol=3e-5, rtol=0)


def test_peft_2_an_adapter_attached_to_a_model_in_eval_mode_is_in_eval_mode() -> None:
    model = with_adapters("llama", a=graft.LoRA(rank=2, dropout=0.5))
    assert torch.equal(logits(model, ids()), logits(model, ids()))


def test_peft_3_tensors_that_fit_nowhere_are_an_error(tmp_path: Path) -> None:
    graft.save(with_adapters("llama", a=graft.LoRA(rank=2, sites="attn.q attn.v")), "a", tmp_path / "a")
    config = (tmp_path / "a" / "adapter_config.json").read_text()
    (tmp_path / "a" / "adapter_config.json").write_text(config.replace("attn.q attn.v", "attn.q"))
    with pytest.raises(graft.GraftError, match="4 extra"):
        graft.load(base("llama"), tmp_path / "a")


def test_peft_4_a_typo_among_right_targets_is_an_error() -> None:
    with pytest.raises(graft.GraftError, match=r"attn\.vv.*Did you mean 'attn\.v'"):
        graft.attach(base("llama"), {"a": graft.LoRA(sites="attn.q attn.vv")})


@pytest.mark.parametrize("kind", ["lora", "ia3", "vera", "loha", "lokr"])
def test_peft_5_two_adapters_at_once_compute_what_they_fold_to(kind: str) -> None:
    spec: Any = {"lora": graft.LoRA(rank=2, sites="attn.q"), "ia3": graft.IA3(sites="attn.k attn.v")} | KINDS
    model = with_adapters("llama", a=[spec[kind], graft.LoRA(rank=3, sites="attn.q attn.v"), spec[kind]])
    apart = logits(model, ids())
    graft.merge(model, "a")
    torch.testing.assert_close(logits(model, ids()), apart, atol=1e-4, rtol=0)


def test_peft_6_a_site_that_a_kind_cannot_serve_is_an_error() -> None:
    with pytest.raises(graft.GraftError, match="kind 'dora' takes linear sites; 'norm' is a norm site"):
        graft.attach(base("llama"), {"a": graft.DoRA(sites="norm")})


def test_peft_7_pissa_leaves_the_base_alone_and_reloads_the_same(tmp_path: Path) -> None:
    model = with_adapters(
        "llama", a=graft.PiSSA(rank=3, niter=2, sites="attn.q"), b=graft.PiSSA(rank=2, sites="attn.q")
    )
    with graft.use(model, None):
        assert torch.equal(logits(model, ids()), logits(pristine("llama"), ids()))
    first = logits(model, ids())
    assert same_base(model, "llama")
    graft.save(model, "a", tmp_path / "a")
    torch.manual_seed(99)
    assert torch.equal(logits(graft.load(base("llama"), tmp_path / "a"), ids()), first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5", "bert"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_peft_8_prefixes_learn_the_same_under_gradient_checkpointing(family: str, when: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = base(family)
        if checkpointing and when == "before":
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        graft.attach(model, {"a": graft.Prefix(tokens=3)})
        randomise(model, "a")
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable()
        loss(model.train(), ids()).backward()
        gradients.append([p.grad for _, p in graft.parameters(model, "a")])
    assert all(g is not None and g.any() for g in gradients[1])
    for plain, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, kept)


def classifier() -> Any:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_peft_9_virtual_tokens_can_be_switched_off_on_a_classifier(kind: str) -> None:
    model = classifier()
    plain = model(ids()).logits
    graft.attach(model, {"a": KINDS[kind]})
    with graft.use(model, None):
        assert torch.equal(model(ids()).logits, plain)
    assert not torch.allclose(model(ids()).logits, plain)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_peft_10_left_padding_does_not_change_what_a_prompt_generates(family: str) -> None:
    model = with_adapters(family, a=graft.PromptTuning(tokens=3))
    inputs = ids(1, 5)
    alone = model.generate(inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(inputs)], 1)
    with_padding = model.generate(
        padded, attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(with_padding.logits[0], alone.logits[0], atol=1e-5, rtol=0)
    assert torch.equal(with_padding.sequences[:, 8:], alone.sequences[:, 5:])


def test_peft_11_a_prompt_on_an_encoder_decoder_needs_no_labels() -> None:
    model = with_adapters("t5", a=graft.PromptTuning(tokens=3))
    assert model(input_ids=ids(), decoder_input_ids=ids()).logits.isfinite().all()


def test_peft_12_one_graph_serves_dora_and_every_switch() -> None:
    torch._dynamo.reset()
    model = with_adapters("llama", a=graft.DoRA(rank=2, sites="attn.q"), b=graft.DoRA(rank=2, sites="attn.q"))
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name in ("a", "b", None, "a"):
        with graft.use(model, name), torch.no_grad():
            compiled(input_ids=ids(), use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_peft_13_a_merge_in_bfloat16_rounds_once() -> None:
    model = base("llama", dtype=torch.bfloat16)
    before = copy.deepcopy(model.model.layers[0].self_attn.q_proj.weight)
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="attn.q")})
    randomise(model, "a")
    own = dict(graft.parameters(model, "a"))
    A, B = (own[f"model.layers.0.self_attn.q_proj.linear.{letter}"] for letter in "AB")
    exact = before.float() + 8.0 * B @ A
    graft.merge(model, "a")
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, exact.to(torch.bfloat16))


# AdapterHub


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapterhub_1_prefixes_compute_the_same_in_every_attention_and_under_padding(family: str) -> None:
    found = []
    for attention in ("eager", "sdpa"):
        model = base(family, attention)
        torch.manual_seed(3)
        graft.attach(model, {"a": graft.Prefix(tokens=3)})
        randomise(model, "a")
        found.append(logits(model, ids()))
        padded = torch.cat([ids(), torch.zeros(3, 4, dtype=torch.long)], 1)
        mask = (torch.arange(11) < 7).long().expand(3, -1)
        found.append(logits(model, padded, attention_mask=mask)[:, :7])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=0)


def reloaded(family: str, spec: Any, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model = with_adapters(family, a=spec)
    graft.save(model, "a", folder / "a")
    return logits(graft.load(base(family), folder / "a"), ids()), logits(model, ids())


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_adapterhub_2_compacters_shared_rule_is_saved(family: str, tmp_path: Path) -> None:
    assert torch.equal(*reloaded(family, graft.Compacter(bottleneck=8, rule_std=0.5), tmp_path))


def test_adapterhub_3_direft_comes_back_as_direft(tmp_path: Path) -> None:
    assert torch.equal(*reloaded("llama", graft.ReFT(form="direft", rank=2), tmp_path))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["dora", "vera"])
def test_adapterhub_4_dora_and_vera_merge_and_come_apart_on_every_family(family: str, kind: str) -> None:
    model = with_adapters(family, a=KINDS[kind])
    apart = logits(model, ids())
    graft.merge(model, "a")
    torch.testing.assert_close(logits(model, ids()), apart, atol=1e-4, rtol=0)
    graft.unmerge(model, "a")
    assert torch.equal(logits(model, ids()), apart) and same_base(model, family)


def test_adapterhub_5_a_prefix_is_saved_once_as_safetensors(tmp_path: Path) -> None:
    graft.save(with_adapters("llama", a=graft.Prefix(tokens=3)), "a", tmp_path / "a")
    assert len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == 2 * 2


def test_adapterhub_6_loreft_is_stored_without_square_matrices(tmp_path: Path) -> None:
    graft.save(with_adapters("llama", a=graft.ReFT(rank=2)), "a", tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in stored.values() if tensor.dim() == 2} == {2}


def test_adapterhub_7_an_adapter_loaded_into_a_model_in_eval_mode_is_in_eval_mode(tmp_path: Path) -> None:
    graft.save(with_adapters("llama", a=graft.ReFT(rank=2, dropout=0.5)), "a", tmp_path / "a")
    model = graft.load(base("llama"), tmp_path / "a")
    assert torch.equal(logits(model, ids()), logits(model, ids()))
