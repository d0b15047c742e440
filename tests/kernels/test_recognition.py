"""What each family's norm and rotation is found to be: by what their source says, which the code under test does not read."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from graft.kernels.norms import Recipe, recipe_of
from graft.kernels.rotary import rotates_halves

LLAMA, AFTER, GEMMA = Recipe(1e-5), Recipe(1e-5, 0.0, "gemma"), Recipe(1e-5, 1.0, "gemma")
NORMS: dict[str, Recipe | None] = {
    "llama.LlamaRMSNorm": LLAMA,
    "qwen3.Qwen3RMSNorm": LLAMA,
    "phi3.Phi3RMSNorm": LLAMA,
    "t5.T5LayerNorm": LLAMA,
    "llama4.Llama4TextRMSNorm": LLAMA,
    "olmo2.Olmo2RMSNorm": AFTER,  # the weight is multiplied in float32
    "gpt_oss.GptOssRMSNorm": AFTER,
    "gemma3n.Gemma3nRMSNorm": AFTER,  # by a power of the mean in place of a square root
    "gemma.GemmaRMSNorm": GEMMA,
    "gemma3.Gemma3RMSNorm": GEMMA,
    "qwen3_next.Qwen3NextRMSNorm": GEMMA,
    "qwen3_next.Qwen3NextRMSNormGated": None,
    "nanochat.NanoChatRMSNorm": None,  # has no weight
}
ROTATIONS = {
    "llama": True, "qwen2": True, "gemma2": True, "phi3": True, "gpt_neox": True, "olmo2": True,
    "cohere": False, "glm4": False,  # turn neighbours
    "modernbert": False,  # in float32
    "gpt_oss": False,  # whose angles are half as many
}  # fmt: skip


def _model_file(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_found_to_be_what_its_source_says(name: str) -> None:
    family, _, cls = name.partition(".")
    kind = getattr(_model_file(family), cls)
    norm = kind(eps=1e-5) if name.startswith("nanochat") else kind(24, eps=1e-5)
    assert recipe_of(norm) == NORMS[name]
    assert recipe_of(norm.to("meta")) == NORMS[name]


@pytest.mark.parametrize("family", ROTATIONS)
def test_a_rotation_is_found_to_be_what_its_source_says(family: str) -> None:
    assert rotates_halves(_model_file(family).apply_rotary_pos_emb) == ROTATIONS[family]


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5), nn.BatchNorm1d(8), nn.PReLU(8), nn.Linear(8, 8), nn.Dropout(0.5)],
)
def test_other_modules_are_no_norms(module: nn.Module) -> None:
    assert recipe_of(module) is None


def test_a_norm_that_does_more_is_left_alone() -> None:
    llama = _model_file("llama").LlamaRMSNorm

    class Clamped(llama):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1.0, 1.0)

    class WithBias(llama):  # type: ignore[misc, valid-type]
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.bias = nn.Parameter(torch.zeros(width))

    assert recipe_of(Clamped(8)) is None and recipe_of(WithBias(8)) is None
    assert recipe_of(llama(8, eps=1e-3)) == Recipe(1e-3)
