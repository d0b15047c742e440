"""Folders for AdapterHub: what its own library wrote is written again tensor by tensor, and what Graft trained comes back as it was."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.attaching.parameters import tensors
from graft.injection.state import state_of
from tests.contract.table import base, ids, logits, randomise
from tests.formats.oracle import base_of, cases
from tests.task_bases import ENCODERS

REFUSED = {"bert-seq_bn-rf-map": "settings that differ between sites"}
"""Cases that Graft reads and does not write."""
ELSEWHERE = {"model_class", "model_name"}
"""Fields that say which base the folder was made on."""
EQUALS: dict[str, set[str]] = {
    "adapter_residual_before_ln": {"bert-double_seq_bn-v2"},  # without ln_after it changes nothing
    "init_weights": {"bert-lora-scale-mode", "bert-vera"},
    "alpha": {"bert-unipelt", "llama-unipelt", "t5-unipelt", "bert-lora-gating"},  # the gate replaces alpha / r
    "vera_b": {"bert-vera"}, "vera_d": {"bert-vera"},  # which is written as the LoRA that it is there
}  # fmt: skip
"""Fields that may differ, and where."""


def _fields(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config of each part of a folder."""
    return config["config"].get("configs", [config["config"]])


def _plain(name: str) -> str:
    """A tensor's name without that of the outer model: the encoder's cases are read into a base without a head."""
    return name.removeprefix("bert.")


def test_what_the_library_wrote_is_written_again(shared: Path, tmp_path: Path) -> None:
    written, bases = 0, {}
    for name in cases(shared, "adapters"):
        folder, out = shared / "oracle" / "adapters" / name, tmp_path / name
        meta = json.loads((folder / "meta.json").read_text())
        key = (meta["base"], meta["task"])
        if key not in bases:
            bases[key] = base_of(folder, meta)
        model = copy.deepcopy(bases[key])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DiReFT or NoReFT
            try:
                graft.load(model, folder / "checkpoint", name="fx")
            except graft.GraftError:
                continue  # which test_oracle.py looks at
        if name in REFUSED:
            with pytest.raises(graft.GraftError, match=REFUSED[name]):
                graft.export(model, "fx", out, format="adapterhub")
            continue
        graft.export(model, "fx", out, format="adapterhub")
        _compare(name, folder / "checkpoint", out)
        written += 1
    assert written == 65


def _compare(name: str, folder: Path, out: Path) -> None:
    theirs = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    theirs = {_plain(key): tensor.float() for key, tensor in theirs.items() if ".prefix_tuning.pool." not in key}
    mine = {_plain(key): tensor for key, tensor in load_file(out / "adapter.safetensors").items()}
    first, second = (_fields(json.loads((each / "adapter_config.json").read_text())) for each in (folder, out))
    folded = any(part.get("architecture") == "prefix_tuning" and not part["flat"] for part in first)
    for part, own in zip(first, second, strict=True):
        differ = {key for key in part.keys() | own.keys() if part.get(key) != own.get(key)}
        differ -= {"flat", "bottleneck_size"} if folded or part.get("architecture") == "prefix_tuning" else set()
        assert {key for key in differ if name not in EQUALS.get(key, ())} == set(), name
    if folded or name == "bert-vera":  # other tensors of the same product
        theirs = {key: tensor for key, tensor in theirs.items() if ".prefix_tunings." not in key and "vera" not in key}
        mine = {key: tensor for key, tensor in mine.items() if key in theirs}
        theirs = {key: tensor for key, tensor in theirs.items() if key in mine}
    if name != "bert-vera":
        assert theirs.keys() == mine.keys(), name
    for key, tensor in theirs.items():
        if key.endswith(".m.weight"):
            torch.testing.assert_close(tensor, mine[key], atol=1e-5, rtol=0)
        elif (
            "parametrizations" not in key and ".units.1." not in key
        ):  # only R is told; the second unit changes no position
            assert torch.equal(tensor, mine[key]), (name, key)
    head = "pytorch_model_head.bin"
    if (folder / head).is_file():
        stored, again = torch.load(folder / head, weights_only=True), load_file(out / "model_head.safetensors")
        assert stored.keys() == again.keys() and all(torch.equal(stored[key], again[key]) for key in stored)
        one, two = (json.loads((each / "head_config.json").read_text()) for each in (folder, out))
        assert {key for key in one if one[key] != two.get(key)} <= {"model_name"}


OUTPUTS = {"kind": "ia3", "inputs": []}
HELD: dict[str, tuple[str, Any]] = {
    "ia3": ("bert", {**OUTPUTS, "sites": "attn.k attn.v mlp.up"}),
    "ia3-slices": ("gpt2", {**OUTPUTS, "sites": "attn.k attn.v mlp.up"}),
    "ia3-t5": ("t5", {**OUTPUTS, "sites": "attn.k attn.v cross.k cross.v mlp.up"}),
    "lora-slices": ("gpt2", graft.LoRA(rank=3, alpha=6, sites="attn.q attn.v mlp.down")),
    "lora-llama": ("llama", graft.LoRA(rank=3, alpha=6, sites="attn.k mlp.down")),
    "compacter": ("llama", graft.Compacter(bottleneck=8)),
    "compacter-factors": ("bert", graft.Compacter(bottleneck=8, rule_rank=1, reads="stream", sites="mlp")),
    "compacter-t5": ("t5", graft.Compacter(bottleneck=8, sites="attn cross mlp")),
    "compacter-whole": ("gpt2", graft.Compacter(bottleneck=8, rank=None, share_rule=False, biases=False)),
    "prefix": ("llama", graft.Prefix(tokens=4)),
    "prefix-t5": ("t5", graft.Prefix(tokens=4, positions="moved_keys", sites="encoder.attn decoder.attn decoder.cross")),
    "prefix-t5-decoder": ("t5", graft.Prefix(tokens=4, positions="moved_keys", sites="decoder.attn")),
    "prompt": ("bert", graft.PromptTuning(tokens=4, enters="blocks")),
    "noreft": ("bert", graft.ReFT(form="noreft", rank=2, prefix=2, suffix=2)),
    "reft-suffix": ("bert", graft.ReFT(form="noreft", rank=2, prefix=0, suffix=2, sites="layer@1")),
    "reft-tied": ("gpt2", graft.ReFT(form="noreft", rank=2, prefix=2, suffix=2, tied=True)),
    "gate-slices": ("gpt2", graft.Gate(of={"kind": "lora", "rank": 3, "alpha": 3.0, "sites": "attn.q attn.v"}, mean="positions")),
    "gate-prefix": ("bert", graft.Gate(of={"kind": "prefix", "tokens": 3, "sites": "attn@1"}, mean="positions")),
    "gate-compacter": ("bert", graft.Gate(
        of={"kind": "compacter", "bottleneck": 8, "reads": "stream", "sites": "mlp"}, reads="output", mean="positions")),
    "gate-parallel": ("llama", graft.Gate(of={"kind": "parallel", "bottleneck": 4, "reads": "stream"}, mean="positions")),
    "mam": ("llama", [graft.Prefix(tokens=3), graft.Parallel(bottleneck=4, reads="stream", scale=4.0, init="mam", sites="mlp")]),
}  # fmt: skip


def _exported(family: str, spec: Any, folder: Path, name: str = "a") -> Any:
    model = base(family)
    graft.attach(model, {name: spec})
    randomise(model, name)
    graft.export(model, name, folder, format="adapterhub")
    return model


@pytest.mark.parametrize("name", HELD)
def test_there_and_back_every_tensor_is_the_same(name: str, tmp_path: Path) -> None:
    family, spec = HELD[name]
    model = _exported(family, spec, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a NoReFT may be a DiReFT
        again = graft.load(base(family), tmp_path / "out", name="a")
    first, second = (dict(tensors(m, state_of(m), "a")) for m in (model, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert torch.equal(logits(again, ids()), logits(model, ids()))


@pytest.mark.parametrize(("prefix", "suffix"), [(2, 0), (0, 2), (1, 2)])
def test_loreft_comes_back_with_the_same_rows_up_to_rounding(prefix: int, suffix: int, tmp_path: Path) -> None:
    model = _exported("bert", graft.ReFT(rank=2, prefix=prefix, suffix=suffix), tmp_path / "out")
    again = graft.load(base("bert"), tmp_path / "out", name="a")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=2e-5, rtol=0)
    graft.export(model, "a", tmp_path / "twice", format="adapterhub")
    one, two = (load_file(tmp_path / each / "adapter.safetensors") for each in ("out", "twice"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_projection_is_folded_away(tmp_path: Path) -> None:
    model = _exported("bert", graft.Prefix(tokens=4, projection=6), tmp_path / "out")
    again = graft.load(base("bert"), tmp_path / "out", name="a")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=1e-5, rtol=0)


def test_dora_goes_where_no_bias_tells_the_two_forms_apart(tmp_path: Path) -> None:
    spec = graft.DoRA(rank=3, alpha=6, sites="attn.q mlp.down")
    model = _exported("llama", spec, tmp_path / "out")
    again = graft.load(base("llama"), tmp_path / "out", name="a")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=1e-4, rtol=0)
    model = base("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.bias.fill_(0.5)
    graft.attach(model, {"a": spec})
    randomise(model, "a")
    with pytest.raises(graft.GraftError, match=r"layer.0.attention.self.query' as it is, or learned another"):
        graft.export(model, "a", tmp_path / "bias", format="adapterhub")


def test_the_layers_of_the_mlp_go_by_the_librarys_own_names(tmp_path: Path) -> None:
    """Its LLaMA has the intermediate LoRA at the last layer of the MLP."""
    for family, flag in (("llama", "intermediate_lora"), ("bert", "output_lora")):
        _exported(family, graft.LoRA(rank=2, sites="attn.q mlp.down"), tmp_path / family)
        config = json.loads((tmp_path / family / "adapter_config.json").read_text())["config"]
        assert {key for key in ("intermediate_lora", "output_lora") if config[key]} == {flag}


def _classifier(family: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ENCODERS[family]()
        config.num_labels = 3
        return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classifiers_head_goes_along(family: str, tmp_path: Path) -> None:
    model = _classifier(family)
    head = "re:.*pooler.dense|classifier" if family == "bert" else r"re:classifier\.(dense|out_proj)"
    graft.attach(model, {"a": [graft.Head(sites=head), graft.LoRA(rank=2, sites="attn.q attn.v")]})
    randomise(model, "a")
    graft.export(model, "a", tmp_path / "out", format="adapterhub")
    again = graft.load(_classifier(family), tmp_path / "out", name="a")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
        with graft.use(model, None):
            assert not torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


@pytest.mark.parametrize(
    ("family", "spec", "reason"),
    [
        ("llama", graft.VeRA(rank=2), "what vera does"),
        ("gpt2", graft.DoRA(rank=2, sites="mlp.up"), "transposed layers"),
        ("llama", graft.IA3(), "factors on the input of a layer"),
        ("llama", graft.LoRA(rank=2, sites="attn.q mlp.gate"), "sites other than attn.q, attn.k, attn.v, mlp.down, mlp.up"),
        ("llama", graft.LoRA(rank=2, sites="attn.q@1"), "some layers of a site only"),
        ("t5", graft.LoRA(rank=2, sites="attn.q cross.v"), "other matrices in cross-attention"),
        ("t5", graft.Series(bottleneck=4, sites="decoder.mlp"), "library would put an untrained one"),
        ("llama", graft.Series(bottleneck=4, sites="attn@0 mlp@1"), "library would put an untrained one"),
        ("llama", graft.Prefix(tokens=2, positions="after_prefix"), "positions: after_prefix"),
        (
            "t5",
            graft.Prefix(tokens=2, positions="moved_keys", sites="decoder.attn@0"),
            "some layers of an encoder-decoder only",
        ),
        ("bert", graft.Gate(of={"kind": "lora", "rank": 2, "alpha": 2.0, "sites": "attn.q attn.v"}), "mean over all positions"),
        ("llama", graft.Gate(of={"kind": "dora", "rank": 2}, per="token"), "gate around dora"),
        ("llama", graft.PromptTuning(tokens=2), "a base of type llama, where the library has none"),
        ("bert", graft.PromptTuning(tokens=2), "positions of their own"),
        ("bert", graft.ReFT(form="direft"), "which its file does not tell from noreft"),
        ("bert", graft.ReFT(positions="all"), "positions: all"),
        ("gpt2", graft.Compacter(bottleneck=8, rank=2, rule_rank=1), "two ranks"),
        ("gptj", graft.Series(bottleneck=4, reads="stream", sites="mlp"), "reads: stream at the mlp of a gptj"),
        ("bloom", graft.Series(bottleneck=4), "AdapterHub keeps the adapters of a 'bloom'"),
        ("bert", graft.Head(sites="head"), "what a head alone does"),
    ],
)  # fmt: skip
def test_what_the_library_cannot_say_is_refused_with_the_reason(
    family: str, spec: Any, reason: str, tmp_path: Path
) -> None:
    model = base(family)
    graft.attach(model, {"a": spec})
    with pytest.raises(graft.GraftError, match=reason):
        graft.export(model, "a", tmp_path / "out", format="adapterhub")
    assert not (tmp_path / "out").exists()


def test_a_stream_behind_gptjs_attention_is_not_read_for_the_one_before_it(tmp_path: Path) -> None:
    _exported("gptj", graft.Series(bottleneck=4, sites="mlp"), tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["config"]["original_ln_before"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(graft.GraftError, match="a residual stream that already holds the attention's output"):
        graft.load(base("gptj"), tmp_path / "out", name="a")


@pytest.mark.parametrize("own", [True, False])
def test_the_head_of_a_class_of_transformers_is_left_out(own: bool, tmp_path: Path) -> None:
    """`LlamaForCausalLM.save_adapter` writes the base's head beside the adapter, with no config of the library's own heads."""
    model = _exported("llama", graft.Series(bottleneck=4, sites="mlp"), tmp_path / "out")
    head = {
        "config": None,
        "model_class": "LlamaForCausalLM",
        "name": None,
        "num_labels": 2,
        "version": "adapters.1.3.0",
    }
    (tmp_path / "out" / "head_config.json").write_text(json.dumps(head))
    weight = base("llama").get_output_embeddings().weight.detach().clone()
    save_file({"lm_head.weight": weight if own else weight + 1}, tmp_path / "out" / "model_head.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = graft.load(base("llama"), tmp_path / "out", name="a")
    said = [str(each.message) for each in caught if "head" in str(each.message)]
    assert (
        said == []
        if own
        else len(said) == 1 and "the head of a LlamaForCausalLM, which is not that of this base" in said[0]
    )
    torch.testing.assert_close(logits(loaded, ids()), logits(model, ids()), atol=1e-6, rtol=1e-6)
