"""Parameters of published configurations, on models of the published sizes without weights.

A row is (name, model, adapter, parameters). The numbers come from the papers and their code, from PEFT and AdapterHub on the same models,
and from arithmetic on the papers' tables where these print rounded ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaConfig,
    DebertaModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import graft
from graft.adapters.parsing import parse

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
T5 = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
DEBERTA = {
    "relative_attention": True,
    "max_relative_positions": -1,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
}

MODELS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "bert-base": (lambda: BertModel(BertConfig()), 109_482_240),
    "bert-base 2-class": (lambda: BertForSequenceClassification(BertConfig()), 109_483_778),
    "bert-large": (lambda: BertModel(BertConfig(**LARGE)), None),
    "distilbert 2-class": (lambda: DistilBertForSequenceClassification(DistilBertConfig()), 66_955_010),
    "roberta-base": (lambda: RobertaModel(RobertaConfig(**ROBERTA)), 124_645_632),
    "roberta-large": (lambda: RobertaModel(RobertaConfig(**ROBERTA, **LARGE)), 355_359_744),
    "deberta-base": (lambda: DebertaModel(DebertaConfig(**DEBERTA)), None),
    "gpt2-medium": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)), 354_823_168),
    "llama-7b": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), 6_738_415_616),
    "t5-base": (lambda: T5ForConditionalGeneration(T5Config(**T5)), 222_903_552),
    "falcon-7b": (lambda: FalconForCausalLM(FalconConfig(tie_word_embeddings=False)), 7_217_189_760),
}
"""Each with the parameters of the base itself, where they are published."""

NORMS = graft.Full(sites="norm")
V1, V2 = graft.LLaMAAdapter(), graft.LLaMAAdapterV2
SERIES = graft.Series
SEQ_BN = SERIES(bottleneck=48)
QV = "attn.q attn.v"
LORETTA = [graft.LorettaAdp(position="before", sites="mlp.gate mlp.up"), graft.LorettaAdp(sites="mlp.down")]

DEPLOYED = [
    graft.Gate(of=graft.Prefix(tokens=10)),
    graft.Gate(of=graft.LoRA(rank=8, sites=QV)),
    graft.Gate(of=SEQ_BN, reads="output"),
]

COUNTS: list[tuple[str, str, Any, int]] = [
    # LoRA and its relatives
    ("lora r8", "bert-base", graft.LoRA(rank=8, sites=QV), 294_912),
    ("lora r8", "roberta-large", graft.LoRA(rank=8, sites=QV), 786_432),
    ("lora r8", "llama-7b", graft.LoRA(rank=8, sites=QV), 4_194_304),
    ("lora r8", "falcon-7b", graft.LoRA(rank=8, sites=QV), 3_506_176),
    ("lora r4 on the fused projection", "gpt2-medium", graft.LoRA(rank=4, sites="attn.qkv"), 393_216),
    ("lora r4 on its slices", "gpt2-medium", graft.LoRA(rank=4, sites=QV), 393_216),
    ("dora r8", "roberta-base", graft.DoRA(rank=8, sites=QV), 313_344),
    ("pissa r8", "bert-base", graft.PiSSA(rank=8, sites=QV), 294_912),
    ("vera r256", "roberta-base", graft.VeRA(rank=256, sites=QV), 24_576),
    ("vera r1024", "roberta-base", graft.VeRA(rank=1024, sites=QV), 43_008),
    ("adalora r12", "roberta-base", graft.AdaLoRA(init_rank=12, sites=QV), 442_656),
    ("miss r64", "llama-7b", graft.MiSS(rank=64, sites=QV), 16_777_216),
    ("miss r64, bat", "llama-7b", graft.MiSS(rank=64, variant="bat", sites=QV), 16_777_216),
    ("miss r64, mini of 64", "llama-7b", graft.MiSS(rank=64, variant="mini", mini_rank=64, sites=QV), 262_144),
    ("hira r32", "llama-7b", graft.HiRA(rank=32, sites=QV), 16_777_216),
    ("shira r32", "llama-7b", graft.SHiRA(rank=32, sites=QV), 16_777_216),
    ("oft of blocks of 32", "llama-7b", graft.OFT(), 17_649_664),
    ("oft of blocks of 32, shared", "llama-7b", graft.OFT(share=True), 111_104),
    # bottlenecks
    ("houlsby r64", "bert-base", SERIES(bottleneck=64, sites="attn mlp"), 2_379_264),
    ("houlsby r64", "bert-large", SERIES(bottleneck=64, sites="attn mlp"), 6_343_680),
    ("houlsby r64 with norms", "bert-large", [SERIES(bottleneck=64, sites="attn mlp"), NORMS], 6_444_032),
    ("pfeiffer r64", "t5-base", SERIES(bottleneck=64), 2_379_264),
    ("houlsby r64", "t5-base", SERIES(bottleneck=64, sites="attn mlp"), 4_758_528),
    ("adapter r24 with norms", "t5-base", [SERIES(bottleneck=24, sites="attn mlp"), NORMS], 1_855_104),
    ("pfeiffer r24 with norms", "t5-base", [SERIES(bottleneck=24), NORMS], 951_360),
    ("adapters r32 without skip", "distilbert 2-class", SERIES(bottleneck=32, skip="none", sites="attn.o mlp.down"), 599_424),
    ("last two layers", "distilbert 2-class", graft.Full(sites="re:pre_classifier|classifier", train_bias=True), 592_130),
    ("adapters r64 without biases", "llama-7b", [
        SERIES(bottleneck=64, biases=False, position="before", sites="mlp.gate mlp.up"),
        SERIES(bottleneck=64, biases=False, sites="mlp.down"),
    ], 50_331_648),
    ("seq_bn", "bert-base", SEQ_BN, 894_528),
    ("seq_bn r16", "roberta-large", SERIES(bottleneck=16), 811_392),
    ("seq_bn r8", "gpt2-medium", SERIES(bottleneck=8), 417_984),
    ("double_seq_bn", "bert-base", SERIES(bottleneck=48, sites="attn mlp"), 1_789_056),
    ("par_bn", "bert-base", graft.Parallel(bottleneck=384), 7_091_712),
    ("par_bn with learned scale", "bert-base", graft.Parallel(bottleneck=384, scale="learned"), 7_091_724),
    ("mam", "bert-base", [graft.Prefix(tokens=30, projection=800), graft.Parallel(bottleneck=384)], 22_493_984),
    # mixtures, in training
    ("adamix r48", "bert-base", "papers/adamix", 2_223_360),
    ("adamix r16", "roberta-large", {"preset": "papers/adamix", "bottleneck": 16}, 1_992_192),
    ("adamix r8, 8 experts", "gpt2-medium", {"preset": "papers/adamix", "bottleneck": 8, "experts": 8}, 1_795_584),
    ("adamix lora r4, 8 experts", "gpt2-medium", "papers/adamix-lora", 1_769_472),
    ("adamix r64 in encoder and decoder", "t5-base", {"preset": "papers/adamix", "bottleneck": 64}, 5_922_816),
    ("mixphm", "t5-base", "papers/mixphm", 874_048),
    # factorised
    ("compacter", "bert-base", graft.Compacter(), 57_088),
    ("compacter++", "bert-base", graft.Compacter(sites="mlp"), 28_576),
    ("compacter", "t5-base", graft.Compacter(), 114_112),
    ("compacter++", "t5-base", graft.Compacter(sites="mlp"), 57_088),
    ("compacter with norms", "t5-base", [graft.Compacter(), NORMS], 161_728),
    ("compacter++ with norms", "t5-base", [graft.Compacter(sites="mlp"), NORMS], 104_704),
    ("loretta adp", "llama-7b", LORETTA, 610_560),
    ("loretta adp with norms", "llama-7b", [*LORETTA, NORMS], 876_800),
    ("loretta rep r8 with norms", "llama-7b", [graft.LorettaRep(tt_rank=8), NORMS], 516_096),
    ("loretta rep r5 with norms", "llama-7b", [graft.LorettaRep(tt_rank=5), NORMS], 368_640),
    ("loretta rep r5 with norms", "deberta-base", [graft.LorettaRep(tt_rank=5, sites="attn.qkv"), NORMS], 52_380),
    # prefixes
    ("prefix 5", "gpt2-medium", graft.Prefix(tokens=5), 245_760),
    ("prefix 5 with projection", "gpt2-medium", graft.Prefix(tokens=5, projection=1024), 51_435_520),
    ("prefix 10", "bert-base", graft.Prefix(tokens=10), 184_320),
    ("prefix 10 with projection", "bert-base", graft.Prefix(tokens=10, projection=512), 9_857_024),
    ("prefix 30", "bert-base", graft.Prefix(tokens=30), 552_960),
    ("prefix 30 with projection", "bert-base", graft.Prefix(tokens=30, projection=512), 9_872_384),
    ("unipelt without gates", "bert-base", [graft.Prefix(tokens=10), graft.LoRA(rank=8, sites=QV), SEQ_BN], 1_373_760),
    ("unipelt AP without gates", "bert-base", [graft.Prefix(tokens=10), SEQ_BN], 1_078_848),
    ("unipelt", "bert-base", "papers/unipelt", 11_083_376),
    ("unipelt AP", "bert-base", "papers/unipelt-ap", 9_857_024 + 894_528 + 18_456),
    ("unipelt with its gates, deployed", "bert-base", DEPLOYED, 1_410_672),
    # prompts
    ("prompt 10", "bert-base", graft.PromptTuning(tokens=10), 7_680),
    ("prompt 20", "gpt2-medium", graft.PromptTuning(tokens=20), 20_480),
    ("p-tuning 20 with an MLP", "gpt2-medium", graft.PTuning(tokens=20, hidden=128), 300_288),
    ("p-tuning 20 with an LSTM", "gpt2-medium", graft.PTuning(tokens=20, hidden=128, encoder="lstm"), 1_926_400),
    ("llama-adapter", "llama-7b", V1, 1_229_760),
    ("llama-adapter with a gate per layer", "llama-7b", graft.LLaMAAdapter(gate="layer"), 1_228_830),
    ("llama-adapter", "falcon-7b", V1, 1_365_330),
    # scaling and bias
    ("ia3", "bert-base", graft.IA3(), 55_296),
    ("ia3 as PEFT places it", "bert-base", graft.IA3(inputs=("attn.o", "mlp.down"), sites="attn.k attn.v attn.o mlp.down"), 64_512),
    ("ia3", "llama-7b", graft.IA3(), 614_400),
    ("ia3", "t5-base", graft.IA3(), 129_024),
    ("bitfit", "bert-base", graft.BitFit(), 102_912),
    ("hadamard without norms", "bert-base", graft.Hadamard(norm="none"), 18_432),
    ("hadamard", "bert-base", graft.Hadamard(), 36_864),
    ("hadamard before the projection", "bert-base", graft.Hadamard(position="before", norm="mlp"), 36_864),
    ("hadamard in 8 layers", "bert-base", graft.Hadamard(sites="attn.o@last8"), 24_576),
    ("v2 of the chat models", "llama-7b", V2(scale="input"), 2_764_800),
    ("v2 with prompts and head", "llama-7b", [V1, V2(sites="linear head")], 4_279_744),
    ("v2 with prompts and head", "falcon-7b", [V1, V2(sites="linear head")], 3_839_186),
    ("v2 of the multimodal fine-tuning", "llama-7b", V2(scale="none", sites="attn.q attn.o mlp.gate mlp.up mlp.down"), 1_363_968),
]  # fmt: skip


@functools.cache
def model(name: str) -> nn.Module:
    """A base without weights."""
    with torch.device("meta"):
        return MODELS[name][0]()


@pytest.mark.parametrize(
    ("name", "base", "adapter", "published"), COUNTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_adapter_has_the_published_number_of_parameters(name: str, base: str, adapter: Any, published: int) -> None:
    graft.attach(model(base), {"a": adapter})
    found = sum(p.numel() for _, p in graft.parameters(model(base), "a"))
    graft.detach(model(base))
    assert found == published


@pytest.mark.parametrize("name", [name for name, (_, published) in MODELS.items() if published])
def test_the_models_themselves_are_those_of_the_publications(name: str) -> None:
    assert sum(p.numel() for p in model(name).parameters()) == MODELS[name][1]


def test_the_distilbert_recipe_has_the_published_total() -> None:
    assert 599_424 + sum(p.numel() for p in model("distilbert 2-class").parameters()) == 67_554_434


COLLAPSED: list[tuple[str, Any, int]] = [
    ("bert-base", "papers/adamix", 894_528),
    ("roberta-large", {"preset": "papers/adamix", "bottleneck": 16}, 811_392),
    ("gpt2-medium", {"preset": "papers/adamix", "bottleneck": 8, "experts": 8}, 417_984),
    ("gpt2-medium", "papers/adamix-lora", 393_216),
    ("t5-base", "papers/mixphm", 339_520),
]
"""Mixtures with their parameters once their experts are one adapter."""


@pytest.mark.parametrize(("base", "adapter", "published"), COLLAPSED)
def test_a_mixture_becomes_an_adapter_of_the_published_size(base: str, adapter: Any, published: int) -> None:
    preset: Any = parse(adapter)
    grafted, config = model(base), preset.resolve(frozenset()).collapsed()
    graft.attach(grafted, {f"collapsed-{published}": config})
    assert graft.summary(grafted).adapter_parameters[f"collapsed-{published}"] == published
