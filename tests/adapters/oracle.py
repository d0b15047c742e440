"""Reference results of other libraries (shared/oracle): the base, the checkpoint's tensors, and whether a model agrees with the outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import graft


@dataclass(frozen=True)
class Case:
    """One checkpoint with what its own library computed."""

    folder: Path
    shared: Path

    @property
    def meta(self) -> dict[str, Any]:
        """The base, the class, the output's name and size."""
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def config(self) -> dict[str, Any]:
        """What the library wrote of the adapter."""
        return json.loads((self.folder / "checkpoint" / "adapter_config.json").read_text())

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by their names, PEFT's prefix taken off."""
        folder = self.folder / "checkpoint"
        path = next(
            path for path in folder.iterdir() if path.name in ("adapter_model.safetensors", "pytorch_adapter.bin")
        )
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}

    def base(self) -> Any:
        """The base in evaluation mode."""
        name = self.meta["base"]
        path = self.shared / "oracle" / name if name.startswith("bases/") else self.shared / name
        cls = getattr(
            transformers, self.meta["model_class"], transformers.AutoModel
        )  # AdapterHub's own classes are bases without a head
        return cls.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()

    def assert_agrees(self, model: Any) -> None:
        """Both batches, with the adapter and without it."""
        expected, output = load_file(self.folder / "expected.safetensors"), self.meta["output"]
        tolerance = max(1e-4, 1e-5 * self.meta["max_abs_output"])
        for batch in ("unpadded", "padded"):
            inputs = {name: expected[f"{batch}.{name}"] for name in ("input_ids", "attention_mask", "decoder_input_ids")
                      if f"{batch}.{name}" in expected}  # fmt: skip
            wanted = expected[f"{batch}.{output}"], expected[f"{batch}.base_{output}"]
            real = inputs["attention_mask"].bool()
            every = wanted[0].dim() < 3 or "decoder_input_ids" in inputs
            for name, reference in zip((graft.names(model)[0], None), wanted, strict=True):
                with torch.no_grad(), graft.use(model, name):
                    difference = (model(**inputs)[output] - reference).abs()
                assert (difference if every else difference[real]).max() < tolerance, (batch, name)


def case(shared: Path, path: str) -> Case:
    """A case by library and name, e.g. "peft/llama-ln"."""
    folder = shared / "oracle" / path
    if not folder.is_dir():
        pytest.skip("the shared inputs have no reference results of other libraries")
    return Case(folder, shared)


def fill(model: Any, name: str, values: dict[str, Tensor]) -> None:
    """Give every parameter of an adapter its value by name; none may be missing and none left over."""
    parameters = dict(graft.parameters(model, name))
    assert set(parameters) == set(values), set(parameters) ^ set(values)
    with torch.no_grad():
        for key, tensor in parameters.items():
            tensor.copy_(values[key])
