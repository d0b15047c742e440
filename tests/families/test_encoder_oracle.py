"""BERT and T5 against the outputs that PEFT and AdapterHub computed, with the weights put in by hand.

The names of the site language have to mean what those libraries adapt: after the sublayers, in q and v, in front of every attention.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel, T5ForConditionalGeneration

import graft
from graft.architectures.site import Site
from graft.injection.state import sites_of

MODELS = {"BertAdapterModel": BertModel, "BertModel": BertModel, "BertForSequenceClassification": BertForSequenceClassification,
          "T5ForConditionalGeneration": T5ForConditionalGeneration}  # fmt: skip


def _case(shared: Path, name: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], str]:
    """The base, the checkpoint's tensors, the expected ones, and the name of the output."""
    folder = shared / "oracle" / name
    if not folder.is_dir():
        pytest.skip(f"no reference case {name}")
    meta = json.loads((folder / "meta.json").read_text())
    model = (
        MODELS[meta["model_class"]]
        .from_pretrained(shared / "oracle" / meta["base"], attn_implementation="eager")
        .eval()
    )
    pickled = folder / "checkpoint" / "pytorch_adapter.bin"
    tensors = (
        torch.load(pickled, weights_only=True)
        if pickled.exists()
        else load_file(folder / "checkpoint" / "adapter_model.safetensors")
    )
    return model, tensors, load_file(folder / "expected.safetensors"), meta["output"]


def _fill(model: Any, given: dict[str, Tensor]) -> None:
    """Set every parameter of adapter "a"; none may be left over."""
    for name, parameter in graft.parameters(model, "a"):
        parameter.data.copy_(given.pop(name).reshape(parameter.shape))
    assert not given


def _compare(model: Any, expected: dict[str, Tensor], output: str) -> None:
    for batch in ("unpadded", "padded"):
        inputs = {name: expected[f"{batch}.{name}"] for name in ("input_ids", "attention_mask")}
        if f"{batch}.decoder_input_ids" in expected:
            inputs["decoder_input_ids"] = expected[f"{batch}.decoder_input_ids"]
        with torch.no_grad():
            got = model(**inputs)[output]
        wanted = expected[f"{batch}.{output}"]
        seen = (
            inputs["attention_mask"].bool()
            if output == "last_hidden_state"
            else torch.ones(got.shape[:-1], dtype=torch.bool)
        )
        assert (got - wanted)[seen].abs().max() < 1e-4
        with torch.no_grad(), graft.use(model, None):
            bare = model(**inputs)[output]
        assert (bare - wanted)[seen].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("case", "sites"),
    [
        ("adapters/bert-lora", "attn.q attn.v"),
        ("adapters/bert-lora-all", "attn.q attn.k attn.v mlp.up mlp.down"),
        ("adapters/t5-lora-all", "attn.q attn.k attn.v cross.q cross.k cross.v mlp.up mlp.down"),
        ("peft/bert-lora", "attn.q attn.v"),
        ("peft/t5-lora", "attn.q attn.v cross.q cross.v"),
    ],
)
def test_lora(shared: Path, case: str, sites: str) -> None:
    model, tensors, expected, output = _case(shared, case)
    settings = json.loads((shared / "oracle" / case / "checkpoint" / "adapter_config.json").read_text())
    settings = settings.get("config", settings)
    classifier = {name.rpartition(".")[2]: tensors.pop(name) for name in list(tensors) if ".classifier." in name}
    if classifier:
        model.classifier.load_state_dict(classifier)
    lora = graft.LoRA(rank=settings["r"], alpha=settings.get("alpha", settings.get("lora_alpha")), sites=sites)
    graft.attach(model, {"a": lora})
    given = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, side = path.replace(".loras.fx", "").rpartition(".")
        prefix = "" if hasattr(model, "bert") or not module.startswith("bert.") else "bert."
        given[f"{module.removeprefix(prefix)}.linear.{side.removeprefix('lora_')}"] = tensor
    _fill(model, given)
    _compare(model, expected, output)


@pytest.mark.parametrize("case", ["adapters/bert-double_seq_bn", "adapters/t5-double_seq_bn"])
def test_houlsby_after_attention_and_mlp(shared: Path, case: str) -> None:
    model, tensors, expected, output = _case(shared, case)
    config = graft.Series(bottleneck=8, activation="silu", sites="attn mlp")
    graft.attach(model, {"a": config})
    given = {}
    for site in sites_of(model, config):
        room = f"bert.{site.module}".removesuffix(".dense") if "bert" in case else ".".join(site.module.split(".")[:5])
        for mine, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
            for end in ("weight", "bias"):
                given[f"{site.module}.{site.part}.f.{mine}.{end}"] = tensors.pop(f"{room}.adapters.fx.{theirs}.{end}")
    assert not tensors
    _fill(model, given)
    _compare(model, expected, output)


def _slots(flat: Tensor, sites: list[Site], tokens: int = 5) -> dict[str, Tensor]:
    """Keys and values by site: [P, 2 L, H, D], slot 2 l the keys of layer l."""
    slots = flat.view(tokens, 2 * len(sites), sites[0].num_kv_heads, sites[0].head_dim)
    return {f"{site.module}.prefix.{name}": slots[:, 2 * number + part] for number, site in enumerate(sites)
            for part, name in enumerate(("keys", "values"))}  # fmt: skip


def test_adapterhub_prefix_in_bert(shared: Path) -> None:
    model, tensors, expected, output = _case(shared, "adapters/bert-prefix_tuning-flat")
    config = graft.Prefix(tokens=5)
    graft.attach(model, {"a": config})
    _fill(
        model,
        _slots(
            tensors["bert.prefix_tuning.prefix_tunings.fx.self_prefix.control_trans"],
            sites_of(model, config),
        ),
    )
    _compare(model, expected, output)


def test_peft_prefix_stands_in_front_of_t5s_decoder(shared: Path) -> None:
    """PEFT lays the slots out twice, four to a layer, and drops the half that was meant for attention over the encoder."""
    model, tensors, expected, output = _case(shared, "peft/t5-prefix")
    graft.attach(model, {"a": graft.Prefix(tokens=5, positions="after_prefix", sites="decoder.attn")})
    sites = sites_of(model, graft.Prefix(sites="decoder.attn"))
    slots = tensors["prompt_embeddings"].view(5, 2 * len(sites), 4, 16)
    given = {f"{site.module}.prefix.{name}": slots[:, (4 * number + part) % (2 * len(sites))] for number, site in enumerate(sites)
             for part, name in enumerate(("keys", "values"))}  # fmt: skip
    _fill(model, given)
    _compare(model, expected, output)


def test_adapterhub_prefix_in_every_attention_of_t5(shared: Path) -> None:
    model, tensors, expected, output = _case(shared, "adapters/t5-prefix_tuning-flat")
    graft.attach(model, {"a": graft.Prefix(tokens=5, positions="moved_keys", sites="attn cross")})
    given = {}
    for name, place in (("encoder", "encoder.attn"), ("self", "decoder.attn"), ("cross", "decoder.cross")):
        sites = sites_of(model, graft.Prefix(sites=place))
        given |= _slots(tensors[f"prefix_tuning.prefix_tunings.fx.{name}_prefix.control_trans"], sites)
    _fill(model, given)
    _compare(model, expected, output)
