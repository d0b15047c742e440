"""Second implementations of LoRA's relatives: PEFT on the same base with the same weights, and the oracle files that it wrote.

`names` maps our parameters to PEFT's: {"A": "lora_A.default.weight"}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graft
from graft.attaching.parameters import tensors
from graft.injection.state import SHARED, state_of
from tests.contract.table import base, ids, logits, loss

LORA = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}


class Twins:
    """One base twice: with an adapter of ours and with PEFT's, all trainable tensors of both drawn once more and equal."""

    def __init__(self, family: str, ours: Any, theirs: Any, names: Mapping[str, str], scale: float = 0.3,
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        peft = pytest.importorskip("peft")
        self.family = family
        self.model, self.reference = (
            base(family, dtype=dtype),
            peft.get_peft_model(base(family, dtype=dtype), theirs).eval(),
        )
        graft.attach(self.model, {"a": ours})
        stored = dict(self.reference.named_parameters())
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for key, parameter in graft.parameters(self.model, "a"):
            module, _, name = key.rsplit(".", 2)
            self.pairs[key] = (parameter, stored.pop(f"base_model.model.{module}.{names[name]}"))
        left = [name for name, parameter in stored.items() if parameter.requires_grad]
        assert not left, f"parameters of PEFT's that have no equal: {left}"
        self.draw(scale)

    def draw(self, scale: float, seed: int = 2) -> None:
        """New values for both: a step of the given size from where ours stand."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for mine, other in self.pairs.values():
                mine.add_(torch.randn(mine.shape, generator=generator) * scale)
                other.copy_(mine.view_as(other))

    def assert_same(self, training: bool = False) -> None:
        """Loss and gradients of both agree; in training mode under the same draws of dropout."""
        values = []
        for model in (self.model, self.reference):
            model.train(training)
            torch.manual_seed(5)
            value = loss(model, ids())
            value.backward()
            values.append(value)
        torch.testing.assert_close(values[0], values[1], atol=2e-5, rtol=0)
        for key, (mine, other) in self.pairs.items():
            assert mine.grad is not None and other.grad is not None, key
            bound = 3e-5 * max(1.0, float(other.grad.abs().max()))
            torch.testing.assert_close(mine.grad, other.grad.view_as(mine), atol=bound, rtol=0, msg=key)
            mine.grad = other.grad = None

    @torch.no_grad()
    def assert_same_merged(self) -> None:
        """The base's weights with ours merged are those that PEFT leaves."""
        hosts = {key.rsplit(".", 2)[0] for key in self.pairs}
        graft.merge(self.model, "a")
        merged = dict(self.reference.merge_and_unload().named_parameters())
        for host in hosts:
            weight, plain = self.model.get_submodule(host).weight, base_weight(self.family, host)
            assert not torch.allclose(weight, plain, atol=1e-3)
            torch.testing.assert_close(weight, merged[f"{host}.weight"], atol=1e-5, rtol=0, msg=host)


def base_weight(family: str, host: str) -> Tensor:
    """The weight of a layer before anything is merged."""
    return base(family).get_submodule(host).weight


@torch.no_grad()
def assert_bfloat16_as_good(family: str, ours: Any, theirs: Any, names: Mapping[str, str], scale: float = 0.3) -> None:
    """On a base in bfloat16 our output is as near to that in float32 as PEFT's, which computes in float32 where it can."""
    twins, exact = Twins(family, ours, theirs, names, 0.0, torch.bfloat16), base(family)
    exact.load_state_dict(
        {name: each.float() for name, each in base(family, dtype=torch.bfloat16).state_dict().items()}
    )
    graft.attach(exact, {"a": ours})
    errors = torch.zeros(2)
    for draw in range(4):
        twins.draw(scale / 2, draw)
        for (_, whole), (mine, _) in zip(graft.parameters(exact, "a"), twins.pairs.values(), strict=True):
            whole.copy_(mine)
        wanted = logits(exact, ids(seed=draw))
        found = [logits(model, ids(seed=draw)).float() for model in (twins.model, twins.reference)]
        errors += torch.stack([(each - wanted).norm() / wanted.norm() for each in found]) / 4
    assert errors[0] < 1.25 * errors[1] and errors[0] < 0.03, errors


class Case:
    """One case of the oracle: its base, what PEFT wrote, and what PEFT computed."""

    def __init__(self, shared: Path, name: str) -> None:
        from transformers import AutoModel, AutoModelForCausalLM

        folder = shared / "oracle" / name
        if not folder.is_dir():
            pytest.skip(f"no oracle case {name} among the shared inputs")
        self.config = json.loads((folder / "checkpoint/adapter_config.json").read_text())
        self.expected = load_file(folder / "expected.safetensors")
        file = next((folder / "checkpoint").glob("*adapter*.[sb][ai][fn]*"))
        loaded = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        self.tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in loaded.items()}
        meta = json.loads((folder / "meta.json").read_text())
        self.output = meta["output"]
        origin = shared / ("" if meta["base"].startswith("models/") else "oracle") / meta["base"]
        cls = AutoModelForCausalLM if self.output == "logits" else AutoModel
        self.model: Any = cls.from_pretrained(origin, attn_implementation="eager").eval()

    def fill(self, names: Mapping[str, str]) -> None:
        """Put the file's tensors into the adapter "a"; `names` maps ours to theirs ("shared.A" to a name of its own)."""
        used = set()
        for key, tensor in tensors(self.model, state_of(self.model), "a"):
            path, _, name = key.rpartition(".")
            shared = path.startswith(SHARED)
            if (f"shared.{name}" if shared else name) in names:
                theirs = names[f"shared.{name}"] if shared else f"{path.rpartition('.')[0]}.{names[name]}"
                used.add(theirs)
                with torch.no_grad():
                    tensor.copy_(self.tensors[theirs].view_as(tensor))
        assert used == set(self.tensors), set(self.tensors) ^ used

    def assert_matches(self) -> None:
        """Both batches give what PEFT computed, where no padding is."""
        for batch in ("unpadded", "padded"):
            inputs = {key: self.expected[f"{batch}.{key}"] for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                found: Tensor = getattr(self.model(**inputs), self.output)
            real, wanted = inputs["attention_mask"].bool(), self.expected[f"{batch}.{self.output}"]
            bound = max(1e-4, 1e-5 * float(wanted.abs().max()))
            torch.testing.assert_close(found[real], wanted[real], atol=bound, rtol=0)
