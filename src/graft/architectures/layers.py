"""Tell linear layers and norms from other modules, and how wide they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from graft.architectures.walk import base_modules
from graft.errors import GraftError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
"""The norms that normalise over the batch or over an image, and not over the last dimension."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: nn.Linear or a subclass, but no block-diagonal one, GPT-2's Conv1D, or one with packed weights.

    Quantised layers are subclasses in most libraries. Those of GPTQ and AWQ are told by the name of their weights.
    """
    packed = "qweight" in module._buffers and hasattr(module, "in_features") and hasattr(module, "out_features")
    return isinstance(module, nn.Linear) and not hasattr(module, "n_groups") or is_transposed(module) or packed


def learning(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield those of (path, module) that lie in no indexer, in their order.

    The indexer of sparse attention chooses the tokens that a query sees. A choice has no gradient, so nothing in it can be learnt.
    """
    inside = ""
    for path, module in modules:
        if inside and path.startswith(inside):
            continue
        inside = f"{path}." if type(module).__name__.endswith("Indexer") else ""
        if not inside:
            yield path, module


COMPUTES = "graft_computes"
"""Attribute of a weight that lies elsewhere than it computes (`graft.distributed.sharded`): the device and the number format there."""


def holds_numbers(weight: Tensor) -> bool:
    """Whether a weight's entries are the numbers that the layer computes with: 8-bit floats go with scales of their own."""
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [in, out] (transformers' Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises over the last dimension and has a weight (LayerNorm, RMSNorm and others of such a name)."""
    if isinstance(module, (*BATCH_NORMS, nn.GroupNorm)):
        return False
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def widths(module: nn.Module, path: str) -> tuple[int, int]:
    """Return the input and output width of a module. Raises `GraftError` if they are not known."""
    if is_transposed(module):
        return tuple(module.weight.shape)  # pyright: ignore
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # pyright: ignore
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        return weight.shape[0], weight.shape[0]
    children = [child for _, child in base_modules(module)]
    linears = [child for child in children if is_linear(child)]
    if not linears and (tables := [child for child in children if isinstance(child, nn.Embedding)]):
        return tables[0].num_embeddings, tables[0].embedding_dim  # a module of embeddings
    if not linears:
        raise GraftError(
            f"the widths of module '{path}' ({type(module).__name__}) are not known: adapt a linear layer or a norm in it"
        )
    return widths(linears[0], path)[0], widths(linears[-1], path)[1]
