"""Registers Graft's model and tasks with lm-eval as soon as lm-eval is imported.

lm-eval knows only models that are registered in its own process and has no plugin mechanism. Therefore `graft_lm_eval.pth`,
which is installed next to this package, imports it whenever Python starts. The import only puts a finder before Python's own
import finders. The finder waits for two modules of lm-eval. When the first has been imported, it registers the model `graft`
(by name, so that Graft itself is imported only when the model is used); when the second has, it adds the folder of Graft's
tasks. To keep the start of Python fast, this package imports only `sys`.
"""

import sys

TYPE_CHECKING = False  # importing typing would take longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

MODEL = "graft.evaluation.lm_eval.model:GraftLM"


def add_model(module: "ModuleType | None" = None) -> None:
    """Register the model `graft` by its import path, as lm-eval registers its own models."""
    from lm_eval.api.registry import model_registry

    if "graft" not in model_registry:
        model_registry.register("graft", target=MODEL)


def add_tasks(module: "ModuleType") -> None:
    """Let `TaskManager` in the module `lm_eval.tasks.manager` also search Graft's folder, after lm-eval's and before the user's."""
    import functools
    import inspect

    inner = module.TaskManager.__init__
    if hasattr(inner, "__wrapped__"):  # already done
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
    """Return the folder of Graft's tasks without importing Graft."""
    import importlib.util
    import os.path

    spec = importlib.util.find_spec("graft")
    assert spec is not None and spec.origin is not None  # Graft is installed together with this package
    return os.path.join(os.path.dirname(spec.origin), "evaluation", "lm_eval", "tasks")


AFTER = {"lm_eval.models": add_model, "lm_eval.tasks.manager": add_tasks}


class Finder:
    """An import finder that finds nothing itself: it lets the others find lm-eval's modules and acts once these are imported."""

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return None for all modules but lm-eval's two; Python calls this for every module that it imports."""
        if name not in AFTER:
            return None
        # Take the spec from the other finders and wrap its loader: first it executes the module, then we act on it.
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
    """Run a registration, and turn any error into a warning: lm-eval may be used without Graft, and must not break."""
    try:
        act(module)
    except Exception as error:
        import warnings

        warnings.warn(
            f"Graft could not register its model and tasks with this version of lm-eval: {error!r}", stacklevel=2
        )


if Finder not in sys.meta_path:
    sys.meta_path.insert(0, Finder)  # pyright: ignore[reportArgumentType]
