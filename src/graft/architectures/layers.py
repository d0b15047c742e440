"""What kind of layer a module is, and how wide."""

from __future__ import annotations

import functools
import inspect
import re

from torch import Tensor, nn

from graft.errors import GraftError


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its kin (quantised ones too; no block-diagonal ones), and the transposed linear layer of GPT-2."""
    return isinstance(module, nn.Linear) and not hasattr(module, "n_groups") or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [in, out] (transformers' Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_norm(module: nn.Module) -> bool:
    """A normalisation over the last dimension with a weight of its own (LayerNorm, RMSNorm and their namesakes)."""
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return False
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def bypassed(parent: nn.Module, name: str) -> bool:
    """Whether a module's code multiplies by the weight of its child instead of calling it: an adapter there would have no effect."""
    source, weight = _source(getattr(type(parent), "graft_base", type(parent))), rf"self\.{re.escape(name)}\.weight"
    never = re.search(weight, source) is not None and f"self.{name}(" not in source
    return never or re.search(rf"{weight}\s*@|linear\([^()]*{weight}", source) is not None


@functools.cache
def _source(cls: type[nn.Module]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # a class without a source file
        return ""


def widths(module: nn.Module, path: str) -> tuple[int, int]:
    """Input and output width of a module. Raises `GraftError` where they cannot be told."""
    if is_transposed(module):
        return tuple(module.weight.shape)  # pyright: ignore
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # pyright: ignore
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        return weight.shape[0], weight.shape[0]
    linears = [child for name, child in module.named_modules() if is_linear(child) and "graft" not in name.split(".")]
    if not linears:
        raise GraftError(
            f"the widths of module '{path}' ({type(module).__name__}) cannot be told: adapt a linear layer or a norm in it"
        )
    return widths(linears[0], path)[0], widths(linears[-1], path)[1]
