"""Graft's own log-probabilities, of the base and of the adapter as a faulty server may apply it.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from graft.architectures.walk import CONTAINER, base_modules
from graft.attaching.attach import detach
from graft.attaching.together import name_of
from graft.errors import GraftError
from graft.formats.loading import load
from graft.generation.causal import CausalBatch
from graft.generation.loaded import LoadedModel
from graft.generation.requests import Request
from graft.injection.modes import evaluation_mode
from graft.injection.state import state_of
from graft.serving.replies import token_text
from graft.training.forward.scoring import Scorer

PART = "graft-check-part"


class Own:
    """The base with one adapter, which answers in place of a server."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.model, self.tokenizer = loaded, loaded.base.model, loaded.base.tokenizer
        (self.candidate,) = loaded.adapters
        self.adapter = str(self.candidate.adapter)
        self._scorer = Scorer(self.model)
        self._texts: dict[str, int] | None = None

    def scores(self, prompts: Sequence[Sequence[int]], adapter: str | None) -> list[list[float]]:
        """Return the log-probability of each token of each prompt but the first."""
        return self._scorer.logprobs([(prompt, 1) for prompt in prompts], [adapter] * len(prompts))

    def scaled(self, scale: float) -> str | None:
        """Return the name of the adapter with its effect times `scale`; None for an adapter that takes no weight."""
        try:
            return name_of(self.model, {self.adapter: scale})
        except GraftError:
            return None

    def parts(self) -> Iterator[tuple[str, str]]:
        """Yield (what is left out, name of the adapter without it), one at a time: kinds of sites, and halves of the layers."""
        installs = state_of(self.model).adapter(self.adapter).installs
        hosts = [each.site.module for each in installs]
        by_site: dict[str, set[str]] = {}
        for each in installs:
            by_site.setdefault(each.site.name, set()).add(each.site.module)
        groups: dict[str, set[str]] = {}
        if len(by_site) > 1:
            groups |= {f"{name}": own for name, own in by_site.items()}
            groups |= {f"everything but {name}": set(hosts) - own for name, own in by_site.items() if len(by_site) > 2}
        layers = sorted({each.site.layer for each in installs if each.site.layer is not None})
        if len(layers) > 1:
            middle = layers[len(layers) // 2]
            late = {each.site.module for each in installs if each.site.layer is not None and each.site.layer >= middle}
            groups |= {f"layers from {middle} on": late, f"layers before {middle}": set(hosts) - late}
        for what, without in groups.items():
            yield what, self._without(without)
            detach(self.model, PART)

    def _without(self, hosts: Collection[str]) -> str:
        """Load the adapter again and take it out of some modules."""
        folder = self.candidate.folder
        assert isinstance(folder, Path)
        load(self.model, folder, name=PART, any_base=True)
        for name, module in base_modules(self.model):
            if name in hosts and CONTAINER in module._modules:
                module._modules[CONTAINER].hooks.pop(PART)  # pyright: ignore
        return PART

    def first_token(self, prompt: Sequence[int], adapter: str | None) -> Tensor:
        """Return the log-probabilities of the first token after a prompt [V]."""
        with torch.no_grad(), evaluation_mode(self.model):
            return CausalBatch(self.model, [Request(tuple(prompt), adapter)], 1).forward()[0].float().log_softmax(-1)

    def pairs(self, given: Mapping[str, float], logprobs_V: Tensor) -> tuple[list[float], list[float]]:
        """Return the server's and our log-probabilities of the tokens that it gave as text and that we know."""
        if self._texts is None:
            self._texts = {token_text(self.tokenizer, token)[0]: token for token in range(len(self.tokenizer))}
        known = {text: self._texts[text] for text in given if text in self._texts}
        return [given[text] for text in known], [float(logprobs_V[token]) for token in known.values()]
