"""Tells lm-eval of Graft, when lm-eval is imported and not before.

lm-eval knows the models that are registered in its process and has no way to find others. `graft_lm_eval.pth`, which is
installed beside this package, imports it whenever Python starts. All that happens then is that a finder is put before Python's
own. It waits for two of lm-eval's modules and, once each has been imported as usual, gives the first the model `graft` (by
name; it is loaded when it is used) and the second the folder of Graft's tasks. This package imports nothing at start but `sys`.
"""

import sys

TYPE_CHECKING = False  # typing itself would cost more to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

MODEL = "graft.evaluation.lm_eval.model:GraftLM"


def add_model(module: "ModuleType | None" = None) -> None:
    """Register the model `graft`, as lm-eval registers its own: a place to import it from."""
    from lm_eval.api.registry import model_registry

    if "graft" not in model_registry:
        model_registry.register("graft", target=MODEL)


def add_tasks(module: "ModuleType") -> None:
    """Let the `TaskManager` of `lm_eval.tasks.manager` look into Graft's folder too, behind its own tasks and before the user's."""
    import functools
    import inspect

    inner = module.TaskManager.__init__
    if hasattr(inner, "__wrapped__"):  # it has been done
        return
    signature = inspect.signature(inner)
    if not {"include_path", "include_defaults"} <= set(signature.parameters):
        raise AttributeError("TaskManager takes no include_path and include_defaults")

    @functools.wraps(inner)
    def init(*args: "Any", **options: "Any") -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        if bound.arguments["include_defaults"]:
            given = bound.arguments["include_path"] or []
            bound.arguments["include_path"] = [_folder(), *(given if isinstance(given, (list, tuple)) else [given])]
        inner(*bound.args, **bound.kwargs)

    module.TaskManager.__init__ = init


def _folder() -> str:
    """Where Graft's tasks lie; Graft itself is not imported for that."""
    import importlib.util
    import os.path

    spec = importlib.util.find_spec("graft")
    assert spec is not None and spec.origin is not None  # it is installed together with this package
    return os.path.join(os.path.dirname(spec.origin), "evaluation", "lm_eval", "tasks")


AFTER = {"lm_eval.models": add_model, "lm_eval.tasks.manager": add_tasks}


class Finder:
    """Finds nothing itself: it lets the others find lm-eval's two modules, and acts once they are imported."""

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Called for every module that is imported for the first time."""
        if name not in AFTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not cls)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: "ModuleType") -> None:
                run(module)
                _then(AFTER[name], module)

            spec.loader.exec_module = exec_module
        return spec


def _then(act: "Any", module: "ModuleType") -> None:
    """Whatever goes wrong, lm-eval itself goes on: it may be used for something that has nothing to do with Graft."""
    try:
        act(module)
    except Exception as error:
        import warnings

        warnings.warn(f"Graft could not make itself known to this lm-eval: {error!r}", stacklevel=2)


if Finder not in sys.meta_path:
    sys.meta_path.insert(0, Finder)  # pyright: ignore[reportArgumentType]
