"""Kronecker sums and tensor trains: equal to their definitions, and as large as published."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import graft
from graft.adapters.kinds.compacter import Compacter, PHMLinear, Rule
from graft.adapters.parts.tensor_train import PUBLISHED, TensorTrain, core_sizes
from graft.architectures.site import SiteSpec

PLACE = SiteSpec("mlp", "sublayer", "block.mlp", 12, 8, 0, 0, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rule_rank", [None, 1])
def test_a_phm_layer_is_the_sum_of_kronecker_products(rank: int | None, rule_rank: int | None) -> None:
    config = Compacter(bottleneck=8, products=4, rank=rank, rule_rank=rule_rank, share_rule=False)
    layer = PHMLinear(config, PLACE, 12, 8)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    assert isinstance(layer.rule, Rule)
    rule = layer.rule.matrices()
    second = layer.B if rank is None else layer.S @ layer.T  # pyright: ignore
    whole = sum(torch.kron(rule[i], second[i]) for i in range(4))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ whole + layer.bias)  # pyright: ignore


def test_products_must_divide_the_widths() -> None:
    with pytest.raises(graft.GraftError, match="5 products must divide both widths.*12 and 8"):
        PHMLinear(Compacter(bottleneck=8, products=5), PLACE, 12, 8)


def test_a_tensor_train_is_the_contraction_of_its_cores() -> None:
    train = TensorTrain(PLACE, 12, 8, rank=3, biases=True)
    left, *rest = [core.detach() for core in train.cores]
    for core in rest:
        left = torch.tensordot(left, core, dims=1)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(train(x), x @ left.reshape(12, 8) + train.bias)


@pytest.mark.parametrize("widths", [sorted(key) * (1 if len(key) == 2 else 2) for key in PUBLISHED])
def test_published_core_sizes_multiply_to_the_matrix(widths: list[int]) -> None:
    assert math.prod(core_sizes(*widths)) == math.prod(widths)


@pytest.mark.parametrize("widths", [(2048, 64), (3072, 8), (11008, 64), (37, 5)])
def test_other_widths_get_core_sizes_too(widths: tuple[int, int]) -> None:
    sizes = core_sizes(*widths)
    assert math.prod(sizes) == math.prod(widths) and (max(sizes) <= 16 or max(sizes) in (37, 43))


@pytest.mark.parametrize(
    ("width", "bottleneck", "rank", "count"),
    [(768, 64, 5, 780), (1024, 64, 5, 840), (4096, 64, 5, 1100), (4096, 8, 5, 800), (4096, 8, 8, 1952),
     (768, 8, 5, 580), (2304, 8, 5, 585), (4096, 64, 8, 2720), (768, 64, 8, 1920), (768, 8, 8, 1408)],
)  # fmt: skip
def test_trains_are_as_large_as_published(width: int, bottleneck: int, rank: int, count: int) -> None:
    meta = SiteSpec("x", "linear", "x", width, width, 0, 0, torch.float32, torch.device("meta"))
    for widths in ((width, bottleneck), (bottleneck, width)):
        assert sum(p.numel() for p in TensorTrain(meta, *widths, rank=rank, biases=False).parameters()) == count


def test_entries_of_a_fresh_train_have_the_published_spread() -> None:
    torch.manual_seed(0)
    spec = SiteSpec("x", "linear", "x", 64, 32, 0, 0, torch.float32, torch.device("cpu"))
    spreads = [TensorTrain(spec, 64, 32, rank=8, biases=False).weight().detach().std() for _ in range(60)]
    assert float(torch.stack(spreads).mean()) == pytest.approx(math.sqrt(1 / 96), rel=0.1)


def test_loretta_rep_begins_at_the_base_unless_told_otherwise() -> None:
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    base = model(ids).logits
    graft.attach(model, {"paper": graft.LorettaRep(), "code": graft.LorettaRep(init_residual=False)})
    assert torch.equal(model(ids).logits, base)
    with graft.use(model, "code"):
        assert not torch.allclose(model(ids).logits, base)


def _count(model: torch.nn.Module, spec: object) -> int:
    graft.attach(model, {"a": spec})  # type: ignore[dict-item]
    return sum(parameter.numel() for _, parameter in graft.parameters(model, "a"))


def test_counts_on_bert_base() -> None:
    with torch.device("meta"):
        models = [BertModel(BertConfig()) for _ in range(2)]
    assert _count(models[0], graft.Compacter(bottleneck=24)) == 57_088
    assert _count(models[1], graft.Compacter(bottleneck=24, sites="mlp")) == 28_576


def test_counts_on_llama_7b() -> None:
    with torch.device("meta"):
        models = [LlamaForCausalLM(LlamaConfig()) for _ in range(3)]
    adp = [
        {"kind": "loretta-adp", "position": "before", "sites": "mlp.gate mlp.up"},
        {"kind": "loretta-adp", "sites": "mlp.down"},
    ]
    norms = 65 * 4096
    assert _count(models[0], adp) == 876_800 - norms
    assert _count(models[1], graft.LorettaRep(tt_rank=8)) == 516_096 - norms
    assert _count(models[2], graft.LorettaRep(tt_rank=5)) == 368_640 - norms
