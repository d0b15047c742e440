"""What is read from the source text of a model's classes.

Why: a module tree does not say in which order a block calls its norms and sublayers, whether it multiplies by a child's weight without
calling the child, or whether an attention module uses transformers' attention interface.
Breaks: a class without a source file, or one written in another style, reads as if nothing were known. Sublayers then have no norm; a
layer that is bypassed gets its adapter, and the probe after attaching refuses it; attention without the interface is refused.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from graft.architectures.walk import plain_class

ADD = "+"
"""The name of a step that adds."""


@dataclass(frozen=True)
class Step:
    """One call of a child, or one addition, in a block's forward."""

    name: str
    """The child's name, or `ADD`."""
    reads: frozenset[str] = frozenset()
    """The variables among its arguments."""
    writes: frozenset[str] = frozenset()
    """The variables that its statement assigns."""


def forward_steps(block: nn.Module) -> tuple[Step, ...]:
    """Return the calls of children and the additions in a block's forward, in the order of evaluation; none without a source.

    E.g. `x = x + self.attn(self.norm(x))` gives the steps norm, attn, +.
    """
    tree = _forward_tree(plain_class(block))
    return () if tree is None else tuple(_steps_below(tree, block, frozenset()))


def bypassed(parent: nn.Module, name: str) -> bool:
    """Whether a module's code multiplies by the weight of its child instead of calling it: an adapter there would have no effect."""
    source, weight = _class_source(plain_class(parent)), rf"self\.{re.escape(name)}\.weight"
    never = re.search(weight, source) is not None and f"self.{name}(" not in source
    return never or re.search(rf"{weight}\s*@|linear\([^()]*{weight}", source) is not None


def forward_names(module: nn.Module, name: str) -> bool:
    """Whether a name occurs in the source of a module's forward."""
    return name in _forward_source(plain_class(module))


@functools.cache
def _class_source(cls: type[nn.Module]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # a class without a source file
        return ""


@functools.cache
def _forward_source(cls: type[nn.Module]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
    except (OSError, TypeError):
        return ""


@functools.cache
def _forward_tree(cls: type[nn.Module]) -> ast.AST | None:
    source = _forward_source(cls)
    return ast.parse(source) if source else None


def _steps_below(node: ast.AST, block: nn.Module, writes: frozenset[str]) -> Iterator[Step]:
    """Yield the steps below a node. writes: the variables that the statement around it assigns."""
    if isinstance(node, ast.Assign):
        writes = frozenset(name for target in node.targets for name in _variables(target))
    children = ast.iter_child_nodes(node)
    # Of `if self.config.parallel:` only the branch that this block takes counts.
    if isinstance(node, ast.If) and (known := _setting(node.test, block)) is not None:
        children = iter(node.body if known else node.orelse)
    for child in children:
        yield from _steps_below(child, block, writes)
    # The node itself comes after its children: an argument is computed before the call.
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "self":
            reads = frozenset(name for part in (*node.args, *node.keywords) for name in _variables(part))
            yield Step(node.func.attr, reads, writes)
    elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
        yield Step(ADD)


def _setting(test: ast.AST, block: nn.Module) -> bool | None:
    """Return what a condition of the form `self.a.b` or `not self.a.b` is for this block; None for any other condition."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _setting(test.operand, block)
        return None if inner is None else not inner
    names: list[str] = []
    while isinstance(test, ast.Attribute):
        names.append(test.attr)
        test = test.value
    if not names or not isinstance(test, ast.Name) or test.id != "self":
        return None
    value = functools.reduce(lambda each, name: getattr(each, name, None), reversed(names), block)
    return value if isinstance(value, bool) else None


def _variables(node: ast.AST) -> Iterator[str]:
    return (each.id for each in ast.walk(node) if isinstance(each, ast.Name) and each.id != "self")
