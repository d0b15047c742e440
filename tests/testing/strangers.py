"""A stranger's kind, in one file: the example that the docstring of the contract gives."""

from __future__ import annotations

import inspect
import textwrap

from graft.adapters import base

IMPORTS = """
from typing import Literal

import torch
from torch import Tensor, nn

import graft
from graft.adapters.base import Adapter, AdapterConfig
from graft.architectures.site import SiteSpec
from graft.routing.context import AdapterContext

"""


def scale_file() -> str:
    """The text of the file: the imports and the example in the docstring of graft/adapters/base.py."""
    text = inspect.cleandoc(base.__doc__ or "")
    start = text.index("    class Scale(AdapterConfig):")
    last = "graft.register(Scale)\n"
    return IMPORTS + textwrap.dedent(text[start : text.index(last) + len(last)])
