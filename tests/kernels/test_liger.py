"""The package liger_kernel itself against torch: on a GPU, or by Triton's interpreter on a CPU, which is slow and needs

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_liger.py

where liger-kernel and triton are installed. The interpreter lacks two things that RMSNorm needs and compiled kernels have: `rsqrt` of
CUDA's library, and floats that are tensors.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.kernels import Kernels, load, serving
from graft.kernels.norms import Recipe
from graft.kernels.rotary import _rotated, _rotation
from tests.kernels.bases import NORMS, base, loss_and_gradient, tokens


def _interpreter() -> str | None:
    """Why Triton's interpreter cannot run; None where it can."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 is not set"
    try:
        import liger_kernel.ops.rms_norm  # noqa: F401
    except ImportError as error:
        return f"liger-kernel and triton are not installed ({error})"
    return None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    if request.param == "cuda":
        pytest.importorskip("liger_kernel")
    elif (reason := _interpreter()) is not None:
        pytest.skip(reason)
    else:
        _complete_interpreter(monkeypatch)
    return load(request.param)


def _complete_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    from tests.kernels.interpreted import rsqrt

    plain = interpreter._implicit_cvt

    def converted(given: Any) -> Any:
        if isinstance(given, float):
            return tl.tensor(interpreter.TensorHandle(np.array([given], np.float32), tl.float32), tl.float32)
        return plain(given)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)


def _gradients(found: Any, *inputs: Tensor) -> list[Tensor]:
    """Of a weighted sum of all outputs, with respect to the inputs; the outputs go first."""
    outputs = found if isinstance(found, tuple) else (found,)
    draw = torch.Generator().manual_seed(3)
    weights = [torch.randn(each.shape, generator=draw).to(each) for each in outputs]
    return [*outputs, *torch.autograd.grad(list(outputs), list(inputs), weights)]


def _close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        tolerance = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
        assert (one.double() - two.double()).abs().max() <= tolerance * (1.0 + two.double().abs().max())


def _drawn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def _calculates(kernels: Kernels, dtype: torch.dtype) -> None:
    if kernels.device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not calculate in bfloat16")


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", [Recipe(1e-6), Recipe(1e-5, 1.0, "gemma"), Recipe(1e-6, 0.0, "gemma")])
def test_the_norm_is_the_recipe(kernels: Kernels, recipe: Recipe, dtype: torch.dtype) -> None:
    x, weight = _drawn(kernels.device, dtype, 2, 5, 24).requires_grad_(), _drawn(kernels.device, dtype, 24)
    found = kernels.norm(x, weight, recipe.eps, recipe.offset, recipe.casting)
    _close(_gradients(found, x), _gradients(recipe.plain(x, weight), x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_rotation_is_by_halves(kernels: Kernels, rows: int, dtype: torch.dtype) -> None:
    _calculates(kernels, dtype)
    q, k = (_drawn(kernels.device, dtype, 2, heads, 7, 12).requires_grad_() for heads in (3, 1))
    angles = _drawn("cpu", torch.float32, rows, 7, 6).repeat(1, 1, 2)
    cos, sin = angles.cos().to(q), angles.sin().to(q)
    kept = q.detach().clone(), k.detach().clone()
    found = _rotation(_never, kernels)(q, k, cos, sin)
    assert torch.equal(q, kept[0]) and torch.equal(k, kept[1])
    _close(_gradients(found, q, k), _gradients((_rotated(q, cos, sin), _rotated(k, cos, sin)), q, k), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_the_product_is_silu_of_e_times_u(kernels: Kernels, kind: str, dtype: torch.dtype) -> None:
    """In the one node of a gated MLP, and in that of the product alone."""
    _calculates(kernels, dtype)
    model = graft.attach(base("llama", dtype).to(kernels.device), {"a": {"kind": kind, "sites": "mlp.gate mlp.down"}})
    mlp, x = model.model.layers[0].mlp, _drawn(kernels.device, dtype, 2, 5, 32).requires_grad_()
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    wanted = _gradients(mlp(x), x, *trained)
    with serving(model, kernels):
        assert model.graft_state.silu_product(x, x) is not None
        _close(_gradients(mlp(x), x, *trained), wanted, dtype)


def _never(*args: Any) -> Any:
    raise AssertionError("the kernel was not used")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_a_model_learns_the_same(kernels: Kernels, family: str) -> None:
    model = graft.attach(base(family).to(kernels.device), {"a": graft.LoRA(rank=4, sites="linear")})
    ids = tokens().to(kernels.device)
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.add_(0.02)
    loss, gradient = loss_and_gradient(model, ids)
    with serving(model, kernels) as served:
        assert served.counts["norms"] == NORMS[family]
        again, same = loss_and_gradient(model, ids)
    assert abs(again - loss) < 1e-5 * loss and (same - gradient).norm() < 1e-4 * gradient.norm()
