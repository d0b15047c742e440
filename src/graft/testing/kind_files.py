"""Read adapter kinds from a Python file, by its path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from graft.adapters.base import AdapterConfig
from graft.adapters.nesting import every_config
from graft.adapters.parsing import parse
from graft.adapters.registry import entries, register
from graft.errors import GraftError


def configs_in(path: Path) -> list[AdapterConfig]:
    """Return what the contract tests of a file: each kind's own example, then the configs of its constant `CONTRACT`.

    The kinds are registered. Raises `GraftError` for a file that is missing, cannot be imported or defines no kind.
    """
    module = imported(path)
    classes = kinds_of(module)
    if not classes:
        raise GraftError(
            f"{path} defines no adapter kind: write a subclass of graft.adapters.base.AdapterConfig "
            '(with `kind: Literal["my-kind"] = "my-kind"`) in it'
        )
    for cls in classes:
        register(cls)
    found = [example_of(cls) for cls in classes]
    listed = getattr(module, "CONTRACT", [])
    if not isinstance(listed, list | tuple) or not all(isinstance(each, AdapterConfig) for each in listed):
        raise GraftError(f"{path}: CONTRACT is a list of configs, such as [MyKind(rank=3)]; given {listed!r}")
    return [*found, *(config for config in listed if config not in found)]


def example_of(cls: type[AdapterConfig]) -> AdapterConfig:
    """Return a kind's own example as a config."""
    config = parse(cls.example())
    assert isinstance(config, AdapterConfig)
    return config


def imported(path: Path, name: str | None = None) -> ModuleType:
    """Import a file under a module name (default: one made of the file's name). Modules beside the file can be imported by it."""
    if not path.is_file():
        raise GraftError(f"there is no file {path}")
    name = name or f"graft_kind_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise GraftError(f"{path} is no Python file: give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling and pydantic look a class's module up there
    try:
        with _first_on_the_path(path.resolve().parent):
            spec.loader.exec_module(module)
    except Exception as error:  # a stranger's file may fail in any way
        del sys.modules[name]
        if isinstance(error, GraftError):
            raise
        line = _line_of(error, path)
        raise GraftError(f"{path} cannot be imported: {type(error).__name__}: {error}{line}") from error
    return module


def kinds_of(module: ModuleType) -> list[type[AdapterConfig]]:
    """Return the kinds that a module defines itself, in the order in which it does."""
    return [
        each
        for each in vars(module).values()
        if isinstance(each, type)
        and issubclass(each, AdapterConfig)
        and each.__module__ == module.__name__
        and isinstance(each.model_fields["kind"].default, str)
    ]


def source_of(config: AdapterConfig) -> list[dict[str, str]]:
    """Return, for each kind that only this process registered, what a fresh process needs to register it too.

    Raises `GraftError` for a class that no other process can import.
    """
    found = []
    for cls in {type(each) for each in (config, *every_config(config))}:
        kind = cls.model_fields["kind"].default
        if kind not in entries() or entries()[kind].origin != "registered":
            continue
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if file is None or "<locals>" in cls.__qualname__:
            raise GraftError(
                f"{cls.__qualname__} is not defined at the top level of a file, so no other process can import it"
            )
        found.append({"file": file, "module": cls.__module__, "class": cls.__qualname__})
    return found


@contextmanager
def _first_on_the_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _line_of(error: BaseException, path: Path) -> str:
    """Return where in the file an import failed, or an empty string."""
    traceback, line = error.__traceback__, None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return "" if line is None else f" (line {line})"
