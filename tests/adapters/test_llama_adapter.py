"""LLaMA-Adapter against PEFT (what it computed, and live on Mistral and GPT-2), against the paper's equation, and in every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import graft
from graft.attaching.active import running
from graft.attention import flat_attention
from graft.routing.context import ForwardContext
from tests.contract.table import GROUPED, base, ids, logits, pristine, randomise
from tests.families.zoo import batch, tiny

AS_PEFT: dict[str, Any] = {"gate": "layer", "squash": "none"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["llama-adaption-prompt", "llama-mha-adaption-prompt"])
def test_it_gives_what_peft_computed(shared: Path, case: str, attention: str) -> None:
    folder = shared / "oracle" / "peft" / case
    if not folder.is_dir():
        pytest.skip("the shared inputs have no reference results of PEFT")
    meta = json.loads((folder / "meta.json").read_text())
    config = json.loads((folder / "checkpoint" / "adapter_config.json").read_text())
    path = shared / "oracle" / meta["base"] if meta["base"].startswith("bases/") else shared / meta["base"]
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype=torch.float32).eval()
    sites = f"attn@last{config['adapter_layers']}"
    graft.attach(model, {"a": graft.LLaMAAdapter(tokens=config["adapter_len"], sites=sites, **AS_PEFT)})
    stored = load_file(folder / "checkpoint" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in graft.parameters(model, "a"):
            module, _, key = name.rpartition(".prefix.")
            theirs = {"prompts": "adaption_prompt", "gate": "adaption_gate"}[key]
            parameter.copy_(stored.pop(f"base_model.model.{module}.{theirs}").view(parameter.shape))
    assert not stored
    expected = load_file(folder / "expected.safetensors")
    for part in ("unpadded", "padded"):
        inputs = {key: expected[f"{part}.{key}"] for key in ("input_ids", "attention_mask")}
        difference = logits(
            model, **{"inputs" if key == "input_ids" else key: tensor for key, tensor in inputs.items()}
        )
        difference = (difference - expected[f"{part}.logits"])[inputs["attention_mask"].bool()]
        assert difference.abs().max() < max(1e-4, 1e-5 * meta["max_abs_output"])


def mistral() -> nn.Module:
    torch.manual_seed(4)
    model = MistralForCausalLM(MistralConfig(vocab_size=61, sliding_window=None, **GROUPED)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_it_equals_peft_live(family: str) -> None:
    peft = pytest.importorskip("peft")
    model, plain = (mistral() if family == "mistral" else base(family) for _ in range(2))
    reference = peft.get_peft_model(
        plain, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2)
    ).eval()
    fields = AS_PEFT | ({"adds": "after_o"} if family == "gpt2" else {})
    graft.attach(model, {"a": graft.LLaMAAdapter(tokens=3, **fields)})
    randomise(model, "a")
    theirs = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in graft.parameters(model, "a"):
            module, _, key = name.rpartition(".prefix.")
            own = {"prompts": "adaption_prompt", "gate": "adaption_gate"}[key]
            theirs[
                f"base_model.{module}.{own}"
                if f"base_model.{module}.{own}" in theirs
                else f"base_model.model.{module}.{own}"
            ].copy_(parameter.view(theirs[next(n for n in theirs if n.endswith(f"{module}.{own}"))].shape))
        wanted = reference(input_ids=ids()).logits
    torch.testing.assert_close(logits(model, ids()), wanted, atol=3e-5, rtol=0)
    assert (wanted - logits(base(family) if family != "mistral" else mistral(), ids())).abs().max() > 1e-2


def written_out(model: Any, prompts: list[Tensor], gates: list[Tensor], inputs: Tensor) -> Tensor:
    """LLaMA by hand with the paper's equation: softmax over prompts apart, tanh of a gate per head, unrotated prompt keys."""
    length, head = inputs.shape[1], 8
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, head, 2) / head)
    cos, sin = (fn(torch.cat([angle, angle], -1)) for fn in (torch.cos, torch.sin))

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., head // 2 :], x[..., : head // 2]], -1) * sin

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, head).transpose(-3, -2)

    x = model.model.embed_tokens(inputs)
    for layer, prompt, gate in zip(model.model.layers, prompts, gates, strict=True):
        u, attention = layer.input_layernorm(x), layer.self_attn
        q, k, v = (heads(project(u)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        k_p, v_p = (heads(project(prompt)).repeat_interleave(2, 0) for project in (attention.k_proj, attention.v_proj))
        q, k, v = rotated(q), rotated(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        own = (q @ k.transpose(-1, -2) / math.sqrt(head)).masked_fill(hidden, -math.inf).softmax(-1) @ v
        second = (q @ k_p.transpose(-1, -2) / math.sqrt(head)).softmax(-1) @ v_p
        both = own + torch.tanh(gate)[:, None, None] * second
        x = x + attention.o_proj(both.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


def test_it_equals_the_papers_equation_written_out_with_grouped_queries() -> None:
    model, inputs = base("llama"), ids(2, 6)
    graft.attach(model, {"a": graft.LLaMAAdapter(tokens=3)})
    randomise(model, "a")
    tensors = dict(graft.parameters(model, "a"))
    prompts, gates = (
        [tensors[f"model.layers.{n}.self_attn.prefix.{key}"] for n in range(2)] for key in ("prompts", "gate")
    )
    with torch.no_grad():
        wanted = written_out(pristine("llama"), prompts, gates, inputs)
    torch.testing.assert_close(logits(model, inputs), wanted, atol=3e-5, rtol=0)


def test_counts_equal_the_published_ones() -> None:
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        model = LlamaForCausalLM(config)
    for fields, published in (({}, 1_229_760), (AS_PEFT, 1_228_830)):
        graft.attach(model, {"a": graft.LLaMAAdapter(**fields)})
        assert sum(p.numel() for _, p in graft.parameters(model, "a")) == published
        graft.detach(model)


@pytest.mark.parametrize("adds", ["before_o", "after_o"])
@pytest.mark.parametrize(
    "family", ["llama", "bloom", "gptj", "falcon", "falcon-mq", "gpt2", "phi3", "qwen3", "olmo2", "gemma3_text"]
)
def test_a_fresh_one_changes_nothing_and_rows_padding_and_segments_do_not_mix(family: str, adds: str) -> None:
    model = tiny(family, "eager")
    inputs = batch(padded=False)["input_ids"]
    plain = logits(model, inputs, use_cache=False)
    graft.attach(
        model,
        {
            "a": graft.LLaMAAdapter(tokens=3, adds=adds),
            "b": graft.LLaMAAdapter(tokens=2, adds=adds, sites="attn@last1"),
        },
    )
    torch.testing.assert_close(logits(model, inputs, use_cache=False), plain, atol=2e-5, rtol=1e-4)
    randomise(model, "a"), randomise(model, "b", 1)
    names, lengths = ("b", None, "b"), (9, 4, 6)
    alone = []
    for name, row, length in zip(names, inputs, lengths, strict=True):
        with graft.use(model, name):
            alone.append(logits(model, row[None, :length], use_cache=False)[0])
    assert (alone[0] - plain[0]).abs().max() > 1e-3
    mask = torch.stack([torch.arange(9) < length for length in lengths]).long()
    with graft.route(model, names):
        together = logits(model, inputs, attention_mask=mask, use_cache=False)
    more: dict[str, Any] = {
        "attention_mask": None if family in ("bloom", "falcon", "falcon-mq") else torch.zeros(1, 1, 1, 1)
    }
    if family != "bloom":
        more["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    tokens = torch.cat([row[:length] for row, length in zip(inputs, lengths, strict=True)])[None]
    with flat_attention(model), running(model, ForwardContext(names, lengths, flat=True)):
        flat = logits(model, tokens, use_cache=False, **more)[0].split(lengths)
    for number, wanted in enumerate(alone):
        torch.testing.assert_close(together[number, : lengths[number]], wanted, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(flat[number], wanted, atol=2e-4, rtol=1e-4)


def test_attention_that_has_no_place_for_a_second_one_is_an_error() -> None:
    model = tiny("deberta-v2")
    with pytest.raises(graft.GraftError, match="cannot run in DeBERTa"):
        graft.attach(model, {"a": graft.LLaMAAdapter()})
    assert graft.names(model) == ()
