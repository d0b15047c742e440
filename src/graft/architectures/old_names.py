"""The names that the weights of a model had in earlier releases of transformers, and what they are called now.

transformers renames the weights of old checkpoints while it loads them, and stacks those of experts. The same map tells what the modules
were called to which an adapter of that time was attached.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class OldNames:
    """The map of one model. It is empty for models that transformers does not know."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        found: list[Any] = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
        self._converters = [each for each in found if isinstance(each, WeightConverter)]
        self._renamings = [each for each in found if not isinstance(each, WeightConverter)]

    def now(self, path: str) -> str:
        """Return what a module is called now. path: what it was called."""
        return self._renamed(path)[0].removesuffix(".weight")

    def stacked(self, path: str) -> tuple[str, int, int, int] | None:
        """Tell where the weight of an expert's layer lies in a stack of all experts.

        Returns the name of the stacked parameter, the expert, and which of how many layers side by side in the stack's output features
        this is; None if the layer is not stacked, or in another way. E.g. `model.layers.0.block_sparse_moe.experts.3.w3` of Mixtral gives
        (`model.layers.0.mlp.experts.gate_up_proj`, 3, 1, 2).
        """
        now, pattern = self._renamed(path)
        converter = next((each for each in self._converters if pattern in each.source_patterns), None)
        if converter is None or pattern is None or "*" not in pattern:
            return None
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            return None
        before = pattern.partition("*")[0].strip(".^").rpartition(".")[2]  # the name of the list, such as `experts`
        parts = path.split(".")
        number = next(
            (part for name, part in zip(parts, parts[1:], strict=False) if name == before and part.isdigit()), None
        )
        sources = list(converter.source_patterns)
        return None if number is None else (now, int(number), sources.index(pattern), len(sources))

    def siblings(self, path: str) -> list[str]:
        """Return the last parts of the names of the layers of an expert, to which a stacked layer belongs."""
        pattern = self._renamed(path)[1] or ""
        head = pattern.partition("*")[0]
        every = [
            name
            for each in self._converters
            for name in each.source_patterns
            if name.partition("*")[0] == head and "*" in name
        ]
        return [name.removesuffix(".weight").rpartition(".")[2] for name in every]

    def _renamed(self, path: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(f"{path}.weight", self._renamings, self._converters)
