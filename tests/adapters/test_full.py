"""Full training of layers, norms, tables and heads: the numbers of training those modules themselves, and of PEFT."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import graft
from graft.attaching.active import running
from graft.attaching.saving import training_state
from graft.attention import flat_attention
from graft.routing.context import ForwardContext
from tests.adapters.oracle import case, fill
from tests.contract.table import Row as ContractRow
from tests.contract.table import attached, base, ids, logits, loss, randomise, same_base

STEPS, LR = 5, 1e-2
T5_PARTS = r"(encoder.*layer\.1\.layer_norm|decoder.*layer\.2\.layer_norm|shared)\.weight"
TRAINED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"sites": "norm"}, r".*norm\.weight"),
    ("gemma2", {"sites": "norm.mlp"}, r".*pre_feedforward_layernorm\.weight"),
    ("gpt2", {"sites": "norm"}, r".*ln_.*"),
    ("bert", {"sites": "norm.attn"}, r".*attention\.output\.LayerNorm.*"),
    ("llama", {"sites": "embed"}, r"model\.embed_tokens\.weight"),
    ("llama", {"sites": "head"}, r"lm_head\.weight"),
    ("gpt2", {"sites": "embed head"}, r"transformer\.wte\.weight"),
    ("gemma2", {"sites": "embed head"}, r"model\.embed_tokens\.weight"),
    ("gpt2", {"sites": "attn.o", "train_bias": True}, r".*attn\.c_proj\..*"),
    ("bert", {"sites": "re:cls.predictions.transform"}, r"cls\.predictions\.transform\..*"),
    (
        "t5",
        {"sites": ("norm.mlp", r"re:(en|de)coder\.embed_tokens", "head")},
        T5_PARTS,
    ),
]


def steps(model: nn.Module, parameters: list[nn.Parameter], seeds: int = STEPS, measured: Any = loss) -> list[float]:
    """The losses of a few steps of AdamW."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0), []
    for seed in range(seeds):
        value = measured(model, ids(4, 8, seed))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(("family", "settings", "pattern"), TRAINED, ids=lambda value: str(value)[:24])
def test_training_equals_ordinary_training_of_the_module_itself(
    family: str, settings: dict[str, Any], pattern: str
) -> None:
    plain, model = base(family), base(family)
    chosen = []
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(re.fullmatch(pattern, name) is not None)
        chosen += [parameter] if parameter.requires_grad else []
    graft.attach(model, {"a": graft.Full(**settings)})
    ours = [p for _, p in graft.parameters(model, "a")]
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in chosen)
    assert steps(model, ours) == pytest.approx(steps(plain, chosen), abs=3e-5)
    torch.testing.assert_close(logits(model, ids()), logits(plain, ids()), atol=2e-4, rtol=0)
    assert same_base(model, family)


def small_roberta() -> Any:
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=3, hidden_dropout_prob=0.0)).eval()


def test_a_classification_head_of_several_layers_trains_as_a_whole_saves_and_merges(tmp_path: Path) -> None:
    def measured(model: Any, inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs, labels=inputs[:, 0] % 3).loss

    plain, model, inputs = small_roberta(), small_roberta(), ids(4, 8)
    plain.requires_grad_(False).classifier.requires_grad_(True)
    graft.attach(model, {"a": graft.Full(sites="re:classifier")})
    assert {name for name, _ in graft.parameters(model, "a")} == {
        f"classifier.other.{layer}.{each}" for layer in ("dense", "out_proj") for each in ("weight", "bias")
    }
    theirs, ours = list(plain.classifier.parameters()), [p for _, p in graft.parameters(model, "a")]
    assert steps(model, ours, measured=measured) == pytest.approx(steps(plain, theirs, measured=measured), abs=1e-5)
    expected = model(inputs).logits
    again = graft.load(small_roberta(), graft.save(model, "a", tmp_path / "a"))
    assert torch.equal(again(inputs).logits, expected)
    with graft.route(model, ["a", None, "a", None]):
        mixed = model(inputs).logits
    torch.testing.assert_close(mixed[::2], expected[::2])
    torch.testing.assert_close(mixed[1::2], small_roberta()(inputs).logits[1::2])
    graft.merge(model, "a")
    assert torch.equal(model(inputs).logits, expected)
    graft.unmerge(model, "a")
    assert torch.equal(model(inputs).logits, expected)


def test_the_dropout_of_a_trained_head_follows_the_mode() -> None:
    model, inputs = small_roberta(), ids(4, 8)
    graft.attach(model, {"a": graft.Full(sites="re:classifier")})
    model.train()
    assert not torch.equal(model(inputs).logits, model(inputs).logits)
    assert torch.equal(model.eval()(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize("sites", ["embed", "head", "embed head"])
def test_rows_of_tokens_train_as_the_rows_of_the_table_themselves(sites: str) -> None:
    """The reference trains the whole table with the gradient of all other rows set to zero, which Adam then leaves."""
    plain, model, tokens = base("gpt2"), base("gpt2"), (5, 0, 17)
    if sites != "embed head":  # the other one keeps its weight
        plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    keep = torch.zeros(61, 1).index_fill(0, torch.tensor(tokens), 1.0)
    weight = plain.lm_head.weight if sites == "head" else plain.transformer.wte.weight
    plain.requires_grad_(False)
    weight.requires_grad_(True).register_hook(lambda grad: grad * keep)
    graft.attach(model, {"a": graft.Full(sites=sites, tokens=tokens)})
    ours = [p for _, p in graft.parameters(model, "a")]
    assert [tuple(p.shape) for p in ours] == [(3, 32)]
    assert steps(model, ours) == pytest.approx(steps(plain, [weight]), abs=3e-5)
    torch.testing.assert_close(logits(model, ids()), logits(plain, ids()), atol=2e-4, rtol=0)


def test_rows_of_new_tokens_come_along_to_a_base_whose_new_rows_are_others(tmp_path: Path) -> None:
    def resized(seed: int) -> Any:
        model = base("llama")
        torch.manual_seed(seed)
        model.resize_token_embeddings(64, mean_resizing=False)
        return model

    model, other, inputs = resized(1), resized(2), torch.tensor([[61, 4, 63, 62, 5]])
    spec = graft.Full(sites="embed head", tokens=(61, 62, 63))
    graft.attach(model, {"a": spec})
    randomise(model, "a")
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
    graft.load(other, graft.save(model, "a", tmp_path / "a"))
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs), atol=1e-5, rtol=0)
    expected = logits(other, inputs)
    graft.merge(other, "a")
    torch.testing.assert_close(logits(other, inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [(), (3, 7)])
def test_a_tied_table_and_head_share_one_difference_and_merge_as_one(tokens: tuple[int, ...]) -> None:
    model, inputs = base("gemma2"), ids()
    graft.attach(model, {"a": graft.Full(sites="embed head", tokens=tokens)})
    assert [name for name, _ in graft.parameters(model, "a")] == ["model.embed_tokens.embedding.weight"]
    randomise(model, "a")
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    graft.merge(model, "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model, inputs), expected, atol=2e-4, rtol=0)
    graft.unmerge(model, "a")
    assert same_base(model, "gemma2")
    randomise(model, "a", 7)  # the copy's head follows the copy's table, not the original's
    assert torch.equal(logits(twin, inputs), expected) and not torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("sites", ["embed", "head"])
def test_one_of_a_tied_pair_alone_changes_that_one_and_cannot_merge(sites: str) -> None:
    model, untied = attached(ContractRow("gpt2", sites, graft.Full(sites=sites))), base("gpt2")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    (difference,) = (p for _, p in graft.parameters(model, "a"))
    host = untied.lm_head if sites == "head" else untied.transformer.wte
    with torch.no_grad():
        host.weight.add_(difference)
    torch.testing.assert_close(logits(model, ids()), logits(untied, ids()), atol=3e-5, rtol=0)
    with pytest.raises(graft.GraftError, match="shares its weight with"):
        graft.merge(model, "a")
    assert same_base(model, "gpt2")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"sites": "norm", "train_bias": True}, "train_bias: has no effect without a linear layer"),
        ({"sites": "norm", "tokens": [1]}, "has no rows of tokens"),
        ({"sites": "embed", "tokens": [1, 1]}, "each id once"),
        ({"sites": "embed", "tokens": [61]}, "there is no row 61; 'model.embed_tokens' has 61 rows"),
        ({"sites": "re:.*self_attn"}, "several inputs or outputs"),
        ({"sites": "re:.*act_fn"}, "."),
        ({"sites": "mlp"}, "kind 'full' takes .* 'mlp' is a sublayer site"),
    ],
)
def test_what_full_training_cannot_do_is_said_and_the_model_left_as_it_was(spec: dict[str, Any], message: str) -> None:
    model = base("llama")
    with pytest.raises(graft.GraftError, match=message):
        graft.attach(model, {"a": {"kind": "full", **spec}})
    assert same_base(model, "llama") and type(model) is type(base("llama"))


@pytest.mark.parametrize("tokens", [(), (3, 9)])
def test_token_flat_rows_of_several_adapters_are_what_they_are_in_a_padded_batch(tokens: tuple[int, ...]) -> None:
    specs = {name: [graft.Full(sites="norm"), graft.Full(sites="embed head", tokens=tokens)] for name in "ab"}
    model, inputs, rows = base("llama"), ids(3, 5), ("a", None, "b")
    graft.attach(model, specs)
    for number, name in enumerate(specs):
        randomise(model, name, number)
    with graft.route(model, rows):
        padded = logits(model, inputs)
    with flat_attention(model), running(model, ForwardContext(rows, (5, 5, 5), flat=True)):
        flat = logits(model, inputs.view(1, -1), position_ids=torch.arange(5).repeat(3)[None], use_cache=False)
    torch.testing.assert_close(flat.view_as(padded), padded, atol=3e-5, rtol=0)


def test_a_module_that_is_called_with_more_than_its_first_input_is_refused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return x * self.weight if gate is None else x * self.weight * gate

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = Gated(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.layer(x), x)

    model = Model()
    graft.attach(model, {"a": graft.Full(sites="re:norm")})
    with pytest.raises(graft.GraftError, match="several inputs or outputs"):
        model(torch.ones(2, 4))


@pytest.mark.parametrize("name", ["llama-ln", "llama-ln-some", "gpt2-ln"])
def test_layer_norm_tuning_gives_the_logits_of_peft(shared: Path, name: str) -> None:
    reference = case(shared, f"peft/{name}")
    model, stored = reference.base(), reference.tensors()
    modules = sorted({key.rsplit(".", 2)[0] for key in stored})
    graft.attach(model, {"a": graft.Full(sites=tuple(f"re:{module}" for module in modules))})
    frozen = dict(model.named_parameters())
    fill(model, "a", {
        key.replace(".ln_tuning_layers.", ".norm."): value - frozen[key.replace(".ln_tuning_layers.", ".")]
        for key, value in stored.items()
    })  # fmt: skip
    reference.assert_agrees(model)


def test_a_saved_head_of_a_tied_base_beside_lora_gives_the_logits_of_peft(shared: Path) -> None:
    reference = case(shared, "peft/llama-lora-lmhead-saved")
    model, stored = reference.base(), reference.tensors()
    graft.attach(model, {"a": [graft.LoRA(rank=4, alpha=8, sites="attn.q attn.v"), graft.Full(sites="head")]})
    values = {
        key.replace(".lora_A.weight", ".linear.A").replace(".lora_B.weight", ".linear.B"): value
        for key, value in stored.items()
    }
    values["lm_head.linear.weight"] = values.pop("lm_head.weight") - model.lm_head.weight.detach()
    fill(model, "a", values)
    reference.assert_agrees(model)


def test_trainable_tokens_of_a_tied_base_give_the_logits_of_peft(shared: Path) -> None:
    reference = case(shared, "peft/llama-trainable-tokens")
    model, tokens = reference.base(), tuple(reference.config["token_indices"])
    graft.attach(model, {"a": graft.Full(sites="embed head", tokens=tokens)})
    rows, same = reference.tensors().values()  # the rows themselves, once for the head and once for the table
    assert torch.equal(rows, same)
    start = training_state(model, "a")["model.embed_tokens.embedding.start"]
    fill(model, "a", {"model.embed_tokens.embedding.weight": rows - start})
    reference.assert_agrees(model)
