"""Kinds by name: Graft's own, those of packages, those that a program registers."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters import registry
from graft.adapters.base import Adapter, AdapterConfig
from graft.architectures.site import SiteSpec
from graft.routing.context import AdapterContext
from tests.small import small_model


class ShiftAdapter(Adapter):
    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.b = torch.nn.Parameter(torch.zeros(spec.out_features, dtype=spec.dtype, device=spec.device))

    def adapt(self, x: Tensor, h: Tensor, ctx: AdapterContext) -> Tensor:
        return h + self.b.to(h.dtype)


class Shift(AdapterConfig):
    """Adds a vector to the output."""

    kind: Literal["test-shift"] = "test-shift"
    sites: str | tuple[str, ...] = "attn.q"

    def build(self, spec: SiteSpec) -> Adapter:
        return ShiftAdapter(spec)


class Point:
    """An entry point, as importlib.metadata gives it."""

    def __init__(self, name: str, value: str, package: str) -> None:
        self.name, self.value = name, value
        self.dist = type("Dist", (), {"name": package, "version": "1.2"})


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {})
    registry._of_packages.cache_clear()
    registry._imported.cache_clear()
    yield
    registry._of_packages.cache_clear()
    registry._imported.cache_clear()


def packages(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: list(points) if group == "graft.kinds" else []
    )


def test_every_built_in_line_names_a_class_of_that_kind() -> None:
    for kind, cls in graft.kinds().items():
        assert cls.model_fields["kind"].default == kind


def test_listing_kinds_imports_none_of_them() -> None:
    code = (
        "import sys, graft; from graft.adapters.registry import entries; assert 'lora' in entries(); "
        "print('torch' in sys.modules, any(name.startswith('graft.adapters.kinds.') for name in sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        == ["False"] * 2
    )


def test_a_registered_kind_attaches_saves_and_loads(tmp_path: Path) -> None:
    assert graft.register(Shift) is Shift
    model = graft.attach(small_model("llama"), {"a": {"kind": "test-shift", "sites": "attn.q"}})
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.normal_()
    graft.save(model, "a", tmp_path / "a")
    again = graft.load(small_model("llama"), tmp_path / "a")
    for (_, one), (_, other) in zip(graft.parameters(model, "a"), graft.parameters(again, "a"), strict=True):
        assert torch.equal(one, other)
    assert registry.entries()["test-shift"].origin == "registered"


def test_a_folder_of_an_unknown_kind_says_where_the_kind_comes_from(tmp_path: Path) -> None:
    graft.register(Shift)
    graft.save(graft.attach(small_model("llama"), {"a": Shift()}), "a", tmp_path / "a")
    registry._registered.clear()
    model = small_model("llama")
    with pytest.raises(graft.GraftError, match="kind 'test-shift', which Graft does not have: it comes from .*Shift"):
        graft.load(model, tmp_path / "a")
    assert not graft.names(model)


def test_save_refuses_a_kind_that_load_could_not_read(tmp_path: Path) -> None:
    model = graft.attach(small_model("llama"), {"a": Shift()})
    with pytest.raises(graft.GraftError, match=r"'a' could not be loaded again.*graft.register\(Shift\)"):
        graft.save(model, "a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_save_refuses_another_class_under_a_known_name(tmp_path: Path) -> None:
    class LoRAOfMine(Shift):
        kind: Literal["lora"] = "lora"  # pyright: ignore

    with pytest.raises(graft.GraftError, match="there is an adapter kind 'lora' already"):
        graft.register(LoRAOfMine)
    model = graft.attach(small_model("llama"), {"a": LoRAOfMine()})
    with pytest.raises(graft.GraftError, match="'lora' is graft.adapters.kinds.lora:LoRA"):
        graft.save(model, "a", tmp_path / "a")


def test_a_notebook_cell_that_runs_again_replaces_its_kind() -> None:
    graft.register(Shift)
    again = type("Shift", (Shift,), {"__module__": Shift.__module__, "__qualname__": Shift.__qualname__})
    graft.register(again)
    assert graft.kinds()["test-shift"] is again


@pytest.mark.parametrize("wrong", [object, 3, "lora", AdapterConfig])
def test_register_refuses_what_is_no_kind(wrong: Any) -> None:
    with pytest.raises(graft.GraftError, match="AdapterConfig"):
        graft.register(wrong)


def test_a_package_brings_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, Point("test-shift", f"{__name__}:Shift", "shifting"))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    assert registry.entries()["test-shift"].origin == "shifting 1.2"
    model = graft.attach(small_model("llama"), {"a": {"kind": "test-shift"}})
    assert graft.summary(model).adapter_parameters["a"] > 0


def test_a_package_cannot_take_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(
        monkeypatch, Point("lora", "their:LoRA", "theirs"), Point("x", "a:X", "first"), Point("x", "b:X", "second")
    )
    with pytest.warns(UserWarning) as caught:
        known = registry.entries()
    assert known["lora"].origin == "graft" and known["x"].origin == "first 1.2"
    assert {str(each.message)[:6] for each in caught} == {"theirs", "second"}


def test_a_broken_package_is_named_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, Point("broken", "no_such_module:X", "broken-package"))
    with pytest.raises(graft.GraftError, match="kind 'broken' of broken-package 1.2 cannot be used: No module named"):
        graft.attach(small_model("llama"), {"a": {"kind": "broken"}})
    with pytest.warns(UserWarning, match="broken-package"):
        assert "lora" in graft.kinds() and "broken" not in graft.kinds()


def test_a_package_must_use_the_name_that_its_config_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, Point("other", f"{__name__}:Shift", "shifting"))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    with pytest.raises(
        graft.GraftError, match="has .*Shift as kind 'other', but the config declares kind 'test-shift'"
    ):
        graft.attach(small_model("llama"), {"a": {"kind": "other"}})
