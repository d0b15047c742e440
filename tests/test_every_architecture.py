"""Every causal-LM type of the installed transformers takes LoRA at `linear` and a series adapter at `mlp`, learns, and comes back.

The numbers of types stand here by release, so that a type that came or went shows; a release not yet counted shows as a warning.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers

import graft
from graft.architectures.sites import SiteTable
from tests.architectures import TYPES, UNBUILT, build, tokens

WITHOUT_MLP = {"falcon_mamba", "mamba", "mamba2", "zamba", "zamba2"}
"""Types whose layers have no MLP of their own: there the series adapter goes behind the whole layer."""
NO_GRADIENT = {"reformer": "its reversible layers pass no gradient to what is inside them when their input needs none"}
"""Types that take adapters but do not train them, with the reason."""
SAMPLE = {
    "bart", "bert", "bloom", "codegen", "cohere", "cpmant", "ctrl", "dbrx", "deepseek_v3", "falcon", "gemma2", "gemma3n_text", "gpt2",
    "gpt_oss", "gptj", "jamba", "jetmoe", "llama", "llama4_text", "longcat_flash", "mamba2", "mixtral", "modernbert-decoder", "mpt",
    "olmo2", "opt", "phi3", "qwen3_next", "rwkv", "whisper", "xlm", "xlnet", "zaya",
}  # fmt: skip
"""One type for each way of building a block; all are in the slow suite."""


COUNTS = {"5.18": 178, "5.23": 189, "5.24": 196}
"""Causal-LM types by release of transformers."""
PINNED = "5.23"
"""The release of constraints.txt."""


def _logits(model: Any) -> torch.Tensor:
    out = model(input_ids=tokens(), use_cache=False)
    return out.logits if hasattr(out, "logits") else out[0]


def test_the_types_of_the_installed_transformers_are_these() -> None:
    release = ".".join(transformers.__version__.split(".")[:2])
    counted = COUNTS.get(release)
    if counted is None:
        warnings.warn(
            f"transformers {release} is not in COUNTS: it has {len(TYPES)} types; look at what is new", stacklevel=1
        )
    assert len(TYPES) == (counted or len(TYPES)) >= min(COUNTS.values())
    if release == PINNED:
        assert set(UNBUILT) < set(TYPES) and len(set(TYPES) - set(UNBUILT)) == COUNTS[PINNED] - len(UNBUILT)
    assert set(TYPES) > WITHOUT_MLP | set(NO_GRADIENT) | SAMPLE


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.slow]) for name in TYPES if name not in UNBUILT],
)
def test_lora_and_series_are_the_identity_learn_and_leave(name: str) -> None:
    model = build(name).requires_grad_(False)  # Falcon-Mamba rounds otherwise where its weights take gradients
    keys, weights = list(model.state_dict()), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = _logits(model)
    assert torch.isfinite(before).all()
    site = "layer" if name in WITHOUT_MLP else "mlp"
    assert ("mlp" in SiteTable(model).names()) == (site == "mlp")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "kind 'lora' at 'linear' does not adapt"
        )  # the weights of recurrences and parallel experts
        graft.attach(model, {"lora": graft.LoRA(rank=1), "series": graft.Series(bottleneck=2, sites=site)})
    for adapter in ("lora", "series"):
        with graft.use(model, adapter), torch.no_grad():
            assert torch.equal(_logits(model), before)
    for adapter in ("lora", "series") if name not in NO_GRADIENT else ():
        graft.set_active(model, adapter)
        _logits(model).float().square().mean().backward()
        moved = [
            key
            for key, parameter in graft.parameters(model, adapter)
            if parameter.grad is not None and parameter.grad.any()
        ]
        assert moved
    assert all(p.grad is None for key, p in model.named_parameters() if "graft" not in key.split("."))
    graft.detach(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(_logits(model), before)
