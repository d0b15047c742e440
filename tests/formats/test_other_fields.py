"""Fields of AdapterHub's and LLM-Adapters' configs: each is used, defaulted or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from tests.contract.table import base, ids, logits, randomise

FOLDERS: dict[str, tuple[str, str, Any]] = {
    "bottleneck": ("adapterhub", "bert", graft.Series(bottleneck=4, sites="attn mlp")),
    "lora": ("adapterhub", "llama", graft.LoRA(rank=2, sites="attn.q attn.v")),
    "prefix": ("adapterhub", "llama", graft.Prefix(tokens=3)),
    "reft": ("adapterhub", "llama", graft.ReFT(rank=2)),
    "llm lora": ("llm-adapters", "llama", graft.LoRA(rank=2, sites="attn.q attn.v")),
    "llm bottleneck": ("llm-adapters", "llama", graft.Parallel(bottleneck=4, sites="mlp.up", biases=False)),
}


def written(name: str, folder: Path) -> tuple[str, torch.Tensor]:
    """Write a folder of another library. Return the family of its base, and what the adapter computes."""
    library, family, spec = FOLDERS[name]
    model = base(family)
    graft.attach(model, {"a": spec})
    randomise(model, "a")
    graft.export(model, "a", folder, format=library)
    return family, logits(model, ids())


def changed(folder: Path, **fields: Any) -> None:
    """Change the fields of the adapter itself; None removes one."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    own = config.get("config", config)
    own.update(fields)
    for name in [name for name, value in fields.items() if value == "left out"]:
        del own[name]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", FOLDERS)
def test_an_unknown_field_is_named_unless_it_is_off(name: str, tmp_path: Path) -> None:
    family, expected = written(name, tmp_path / "a")
    changed(tmp_path / "a", a_new_field=None, another=False)
    torch.testing.assert_close(logits(graft.load(base(family), tmp_path / "a"), ids()), expected, atol=2e-5, rtol=1e-4)
    changed(tmp_path / "a", a_new_field=3)
    with pytest.raises(graft.GraftError, match="with a_new_field: 3 has no equal in Graft, which knows its fields"):
        graft.load(base(family), tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bottleneck", {"residual_before_ln": "post_add"}, "residual_before_ln: 'post_add' is not allowed"),
        ("bottleneck", {"stochastic_depth": 0.1}, "stochastic_depth: 0.1 has no equal in Graft"),
        ("bottleneck", {"non_linearity": "left out"}, "lacks the field 'non_linearity'"),
        ("bottleneck", {"inv_adapter": "glow"}, "form 'glow', which Graft has no kind for"),
        ("bottleneck", {"inv_adapter": "nice"}, "but not in BertForMaskedLM"),
        ("bottleneck", {"use_gating": True}, "missing: .*gate.bias"),
        ("bottleneck", {"use_gating": True, "ln_after": True}, "gates with ln_after"),
        ("lora", {"use_gating": True}, "missing: .*gate.bias"),
        ("lora", {"use_gating": True, "use_dora": True}, "gates .use_gating. with DoRA or VeRA"),
        ("prefix", {"use_gating": True}, "missing: .*prefix_gates"),
        ("prefix", {"use_gating": True, "shared_gating": False}, "a gate for keys and one for values"),
        ("lora", {"attn_matrices": ["q", "o"]}, "attn_matrices.*'o' is not allowed"),
        ("lora", {"r": "2"}, "r: '2' is not allowed"),
        ("prefix", {"non_linearity": "relu"}, "non_linearity: 'relu' is not allowed"),
        ("reft", {"layers": "some"}, "'some' is not allowed"),
        ("llm lora", {"lora_alpha": "left out"}, "lacks the field 'lora_alpha'"),
        ("llm lora", {"use_rslora": True}, "LLM-Adapters' LORA with use_rslora: True has no equal in Graft"),
        ("llm bottleneck", {"scaling": "sometimes"}, "'sometimes' is not allowed"),
    ],
)
def test_a_field_that_cannot_be_read_is_named(name: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    family, _ = written(name, tmp_path / "a")
    changed(tmp_path / "a", **fields)
    model = base(family)
    with pytest.raises(graft.GraftError, match=message):
        graft.load(model, tmp_path / "a")
    assert not graft.names(model)
