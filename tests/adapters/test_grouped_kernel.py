"""Where grouped products are taken, what goes into one, and that it lies as the kernel asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graft.ops import low_rank_grouped as grouped
from graft.ops.low_rank import add_low_rank
from graft.ops.low_rank_grouped import has_kernel, product_groups
from graft.ops.low_rank_update import LowRankUpdate
from tests.adapters.test_grouped import I, O, distance, inputs, learnt, leaves, terms  # noqa: E741


def test_ranks_up_to_a_tile_stand_together_and_greater_ones_by_powers_of_two(monkeypatch: Any) -> None:
    given = terms(True, ranks=(1, 64, 65, 128, 129))
    x = torch.zeros(1, 20, I)
    assert product_groups(given, x, O) == [[0], [1], [2], [3], [4]]  # no kernel on a CPU
    monkeypatch.setattr(grouped, "has_kernel", lambda x: True)
    assert product_groups(given, x, O) == [[0, 1], [2, 3], [4]]
    assert product_groups(given[:1], x, O) == [[0]]
    assert product_groups(given, x[..., :20], O) == product_groups(given, x, 12) == [[0], [1], [2], [3], [4]]
    monkeypatch.setattr(grouped, "MAX_UPDATES", 2)
    assert product_groups(given[:2] * 2, x, O) == [[0, 1], [2, 3]]
    half = LowRankUpdate(given[0].A.bfloat16(), given[0].B.bfloat16(), 1.0, 0.0, 0, given[0].ctx, given[0].rows)
    assert product_groups([given[0], half], x, O) == [[0], [1]]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"capability": (10, 3)}, True),
        ({"capability": (8, 0)}, False),
        ({"capability": (12, 0)}, False),
        ({"dtype": torch.float32}, False),
        ({"is_cuda": False}, False),
        ({"platform": "win32"}, False),
        ({"hip": "7.0"}, False),
    ],
)
def test_the_kernel_is_there_where_torch_says_so(monkeypatch: Any, changed: dict[str, Any], expected: bool) -> None:
    there = {
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "is_cuda": True,
        "platform": "linux",
        "hip": None,
        **changed,
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: there["capability"])
    monkeypatch.setattr(torch.version, "hip", there["hip"])
    monkeypatch.setattr("graft.ops.low_rank_grouped.sys.platform", there["platform"])
    tensor: Any = SimpleNamespace(dtype=there["dtype"], is_cuda=there["is_cuda"], device="cuda")
    assert has_kernel(tensor) == expected
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert not has_kernel(tensor)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("alignment", ["whole", "odd address", "odd stride"])
def test_what_is_multiplied_lies_as_the_kernel_asks(monkeypatch: Any, flat: bool, gap: int, alignment: str) -> None:
    """Addresses and strides of 16 bytes, which torch does not ask for on a CPU; two jagged matrices so that a group may have any length."""
    multiplied: list[tuple[int, int]] = []

    def product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        for matrix in (a, b):
            one, other = matrix.stride()[-2:]
            long = other if one == 1 else one
            assert min(one, other) == 1 and long % 8 == 0 and matrix.data_ptr() % 16 == 0
            assert long >= matrix.shape[-2 if one == 1 else -1] and all(step % 8 == 0 for step in matrix.stride()[:-2])
        if a.dim() == b.dim():
            assert a.stride(0) == b.stride(1) == 1
        assert ends.dtype == torch.int32 and int(ends[-1]) == (a.shape[1] if a.dim() == b.dim() else a.shape[0])
        multiplied.append((a.dim(), b.dim()))
        return F.grouped_mm(a, b, offs=ends)

    monkeypatch.setattr(grouped, "has_kernel", lambda x: True)
    monkeypatch.setattr(grouped, "grouped_product", product)
    given = terms(flat, 0.0, gap)
    x, h = (tensor.detach().bfloat16() for tensor in inputs(given, gap))
    if alignment == "odd address":
        x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    if alignment == "odd stride":
        x = torch.cat([x, x[..., :1]], -1)[..., :-1]
    x.requires_grad_()
    out = add_low_rank(x, h, given)
    torch.autograd.grad(out.sum(), leaves(x, h, given)[:1] + leaves(x, h, given)[2:])
    assert multiplied == 2 * [(2, 3), (2, 3)] + 2 * [(2, 3), (2, 2), (2, 2), (2, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("gap", [0, 3])
def test_on_a_gpu_the_kernel_gives_what_one_after_another_gives(monkeypatch: Any, gap: int) -> None:
    given = terms(True, 0.2, gap, device="cuda", sizes=(256, 512))
    rows = max(term.rows.stop for term in given)  # type: ignore[union-attr]
    torch.manual_seed(4)
    x, h = (torch.randn(1, rows, size).bfloat16().cuda().requires_grad_() for size in (256, 512))
    if not has_kernel(x):
        pytest.skip("this GPU or torch has no kernel for grouped products")
    found = learnt(add_low_rank(x, h, given), leaves(x, h, given))
    monkeypatch.setattr(grouped, "has_kernel", lambda x: False)
    for own, other in zip(found, learnt(add_low_rank(x, h, given), leaves(x, h, given)), strict=True):
        assert distance(own, other.double()) < 2**-6
