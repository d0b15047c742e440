"""AdapterHub's folders of an AdapterFusion, against the published equations, written here on the tensors of the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import graft
from graft.cli import main
from graft.errors import GraftError
from graft.formats.adapterhub.fusion import FUSION, convert
from tests.contract.table import base, ids, logits, with_adapters

NAMES = ("one", "two", "three")
STREAM: dict[str, Any] = {"kind": "series", "bottleneck": 6, "reads": "stream", "init": "bert", "sites": "mlp"}
PLAIN: dict[str, Any] = {"kind": "series", "bottleneck": 6, "init": "bert", "sites": "attn mlp"}
CONFIG: dict[str, Any] = {
    "key": True, "query": True, "value": True, "query_before_ln": False, "regularization": True, "residual_before": False,
    "temperature": False, "value_before_softmax": True, "value_initialized": True, "dropout_prob": None,
}  # fmt: skip


def layer(block: Any, site: str) -> tuple[str, Any]:
    """Where the library keeps what it adds at a sublayer of BERT, and the module there: a linear layer and the norm after it."""
    return ("attention.output", block.attention.output) if site == "attn" else ("output", block.output)


def written(folder: Path, adapter: dict[str, Any], sites: str = "mlp", **config: Any) -> tuple[Path, dict[str, Tensor]]:
    """Three adapters and their fusion, as `save_adapter` and `save_adapter_fusion` of adapters 1.3 leave them, and the fusion's tensors."""
    model = with_adapters("bert", **{name: {**adapter, "bottleneck": 4 + number} for number, name in enumerate(NAMES)})
    for name in NAMES:
        graft.export(model, name, folder / name, format="adapterhub")
        header = json.loads((folder / name / "adapter_config.json").read_text())
        assert header["name"] == name
    config = {**CONFIG, **config}
    generator, tensors, width = torch.Generator().manual_seed(5), {}, model.config.hidden_size
    for number, block in enumerate(model.bert.encoder.layer):
        for site in sites.split():
            prefix = f"bert.encoder.layer.{number}.{layer(block, site)[0]}.adapter_fusion_layer.{','.join(NAMES)}"
            for matrix in ("query", "key", "value"):
                if config[matrix]:
                    tensors[f"{prefix}.{matrix}.weight"] = torch.randn(width, width, generator=generator) / 4
                    if matrix != "value":
                        tensors[f"{prefix}.{matrix}.bias"] = torch.randn(width, generator=generator)
    fused = folder / ",".join(NAMES)
    fused.mkdir()
    save_file(tensors, fused / "model_adapter_fusion.safetensors")
    header = {
        "adapter_names": list(NAMES), "config": config, "hidden_size": width, "model_class": "BertForMaskedLM", "model_name": "",
        "model_type": "bert", "name": ",".join(NAMES), "version": "adapters.1.3.0",
    }  # fmt: skip
    (fused / FUSION).write_text(json.dumps(header))
    return fused, tensors


def by_equations(fused: Path, tensors: dict[str, Tensor], sites: str, config: dict[str, Any], stream: bool) -> Tensor:
    """The logits of a BERT in which each adapted sublayer computes the fusion by its equations."""
    model = base("bert")
    files = [load_file(fused.parent / name / "adapter.safetensors") for name in NAMES]
    for number, block in enumerate(model.bert.encoder.layer):
        for site in sites.split():
            path, module = layer(block, site)
            own = f"bert.encoder.layer.{number}.{path}"

            def forward(hidden: Tensor, residual: Tensor, own: str = own, module: Any = module) -> Tensor:
                h = module.dense(hidden)
                u = module.LayerNorm(h + residual) if stream else h
                ups = []
                for name, file in zip(NAMES, files, strict=True):
                    at = f"{own}.adapters.{name}"
                    down = F.relu(F.linear(u, file[f"{at}.adapter_down.0.weight"], file[f"{at}.adapter_down.0.bias"]))
                    ups.append(F.linear(down, file[f"{at}.adapter_up.weight"], file[f"{at}.adapter_up.bias"]))
                up = torch.stack(ups, 2)  # [B, L, N, D]
                at = f"{own}.adapter_fusion_layer.{','.join(NAMES)}"
                asks = h if config["query_before_ln"] else u
                query = F.linear(asks, tensors[f"{at}.query.weight"], tensors[f"{at}.query.bias"])
                key = F.linear(up, tensors[f"{at}.key.weight"], tensors[f"{at}.key.bias"])
                value = up @ tensors[f"{at}.value.weight"].T if config["value"] else up
                chances = (query[:, :, None] @ key.transpose(-1, -2)).softmax(-1)  # [B, L, 1, N]
                return module.LayerNorm((chances @ value)[:, :, 0] + h + residual)

            module.forward = forward
    with torch.no_grad():
        return logits(model, ids())


CASES = {
    "seq_bn": (STREAM, "mlp", {}),
    "seq_bn, asked before the norm": (STREAM, "mlp", {"query_before_ln": True}),
    "seq_bn, static": (STREAM, "mlp", {"value": False, "regularization": False}),
    "double_seq_bn": (PLAIN, "attn mlp", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fusion_computes_what_its_folders_say(case: str, tmp_path: Path) -> None:
    adapter, sites, config = CASES[case]
    fused, tensors = written(tmp_path / "hub", adapter, sites, **config)
    model = base("bert")
    convert(model, fused, tmp_path / "own", "f")
    wanted = by_equations(fused, tensors, sites, {**CONFIG, **config}, stream=adapter is STREAM)
    torch.testing.assert_close(logits(model, ids()), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, logits(base("bert"), ids()), atol=1e-2)
    again = graft.load(base("bert"), tmp_path / "own" / "fusion", name="again")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=0, rtol=0)
    trained = sum(parameter.numel() for _, parameter in graft.parameters(model, "f"))
    assert trained == sum(tensor.numel() for tensor in tensors.values())


def test_the_command_converts_a_fusion_with_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fused, tensors = written(tmp_path / "hub", STREAM)
    base("bert").save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit) as ended:
        main(["import", str(fused), "--base", str(tmp_path / "base"), "--to", str(tmp_path / "own")])
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert {each.name for each in (tmp_path / "own").iterdir()} == {*NAMES, "fusion"}
    model = graft.load(base("bert"), tmp_path / "own" / "fusion", name="f")
    wanted = by_equations(fused, tensors, "mlp", CONFIG, stream=True)
    torch.testing.assert_close(logits(model, ids()), wanted, atol=1e-5, rtol=1e-5)


def test_what_has_no_equal_is_named(tmp_path: Path) -> None:
    fused, _ = written(tmp_path / "hub", STREAM)
    path = fused / FUSION
    header = json.loads(path.read_text())
    model = base("bert")
    with pytest.raises(
        GraftError, match="AdapterFusion of AdapterHub, which is made of the adapters beside it: convert"
    ):
        graft.load(model, fused)
    for change, said in (
        ({"temperature": True}, "a fusion with temperature: true"),
        ({"residual_before": True}, "residual_before: true"),
        ({"query": False}, "query: false"),
        ({"query": 3}, "query"),
        ({"unheard_of": 3}, "unheard_of"),
        ({"value": False}, "unexpected.*value.weight"),
    ):
        path.write_text(json.dumps({**header, "config": {**CONFIG, **change}}))
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        with pytest.raises(GraftError, match=said):
            convert(model, fused, tmp_path / "own", "f")
        assert graft.names(model) == ()
    path.write_text(json.dumps(header))
    shutil.rmtree(fused.parent / "two")
    with pytest.raises(
        GraftError, match="fusion of the adapters one, two, three, and there is no folder of two beside it"
    ):
        convert(model, fused, tmp_path / "own", "f")


def test_parallel_bottlenecks_are_refused(tmp_path: Path) -> None:
    fused, _ = written(tmp_path / "hub", {"kind": "parallel", "bottleneck": 6, "reads": "stream", "sites": "mlp"})
    with pytest.raises(GraftError, match="a parallel bottleneck, for which the library adds the residual stream twice"):
        convert(base("bert"), fused, tmp_path / "own", "f")
