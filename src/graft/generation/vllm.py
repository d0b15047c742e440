"""The engine that generates answers with vLLM (github.com/vllm-project/vllm): the bare base and LoRA adapters on it.

Adapters are handed to vLLM as PEFT folders (`graft.export`). vLLM serves plain LoRA with one rank and one alpha. Any other
adapter that can be folded into the weights has to be merged first (`graft merge`); the merged model is then a base like any
other. Prompts and answers are passed as token ids, as in Graft's own generation, and only a request's own stop tokens end
its answer. vLLM's beam search scores and stops by other rules than that of transformers, so beams are refused.

The module uses `vllm.LLM`, `vllm.SamplingParams` and `vllm.lora.request.LoRARequest` as vLLM 0.8 to 0.22 document them.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graft.errors import GraftError, require
from graft.formats.exporting import export
from graft.generation.loaded import LoadedModel
from graft.generation.requests import Decoding, Generated, Request, limits
from graft.injection.state import state_of
from graft.utils.jsonl import read_json

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's max_lora_rank may have."""
AT_ONCE = 256
"""Requests that are handed to vLLM in one call; their answers are written before the next call."""
NOT_PLAIN = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "LoRA biases",
    "modules_to_save": "whole modules in addition to the LoRA",
    "rank_pattern": "LoRAs of several ranks",
    "alpha_pattern": "LoRAs of several alphas",
    "trainable_token_indices": "trained token embeddings",
}
"""Fields of PEFT's adapter_config.json that vLLM refuses or ignores, and what they stand for."""


class VLLM:
    """vLLM with the base of a loaded model and its adapters.

    vLLM loads the base itself. The copy in the loaded model generates nothing and may stay on the CPU.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        """Raises `MissingExtra` if vLLM is not installed, and `GraftError`, with the reason, for an adapter it cannot serve."""
        self._vllm: Any = require("vllm", "vllm")
        self._requests: Any = require("vllm.lora.request", "vllm")
        self.name = f"vllm {self._vllm.__version__}"
        self._model = loaded.base.model
        # vLLM reads the adapters from folders; these are removed together with this object.
        folder = Path(tempfile.mkdtemp(prefix="graft-vllm-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        names = [each.adapter for each in loaded.adapters if each.adapter is not None]
        ranks = [_exported(loaded, name, folder / name) for name in names]
        self._loras = {
            name: self._requests.LoRARequest(name, number, str(folder / name))
            for number, name in enumerate(names, start=1)
        }
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _max_lora_rank(max(ranks))} if ranks else {}
        self._llm = self._vllm.LLM(
            model=_base_path(loaded),
            dtype=str(loaded.base.dtype).removeprefix("torch."),
            skip_tokenizer_init=True,
            **lora,
        )

    def check(self, requests: Sequence[Request], token_budget: int) -> int:
        """Return 0: the self-check covers Graft's own generation only."""
        return 0

    def answers(
        self, requests: Sequence[Request], decoding: Decoding, token_budget: int
    ) -> Iterator[tuple[int, Generated]]:
        """Yield (number of the request, its answer). vLLM fills its batches itself, so the token budget has no effect.

        Raises `GraftError` for beams.
        """
        if decoding.beams > 1:
            raise GraftError(
                f"vLLM's beam search is not the one that this protocol names ({decoding.beams} beams of transformers): choose "
                "a protocol that decodes greedily, such as strict, or leave out --engine vllm"
            )
        room = limits(self._model, requests, decoding)
        by_adapter: dict[str | None, list[int]] = {}
        for number, request in enumerate(requests):
            if room[number]:
                by_adapter.setdefault(request.adapter, []).append(number)
            else:
                yield number, Generated((), "no_room")
        for adapter, numbers in by_adapter.items():
            for start in range(0, len(numbers), AT_ONCE):
                some = numbers[start : start + AT_ONCE]
                found = self._llm.generate(
                    [{"prompt_token_ids": list(requests[number].ids)} for number in some],
                    [self._sampling(requests[number], room[number], decoding) for number in some],
                    lora_request=None if adapter is None else self._loras[adapter],
                    use_tqdm=False,
                )
                for number, output in zip(some, found, strict=True):
                    yield number, _answer(list(output.outputs[0].token_ids), requests[number].stop_ids)

    def _sampling(self, request: Request, limit: int, decoding: Decoding) -> Any:
        return self._vllm.SamplingParams(
            temperature=decoding.temperature, top_p=decoding.top_p, max_tokens=limit, stop_token_ids=sorted(request.stop_ids),
            ignore_eos=True, detokenize=False, seed=decoding.seed if decoding.temperature else None,
        )  # fmt: skip


def _exported(loaded: LoadedModel, name: str, folder: Path) -> int:
    """Write a LoRA as a PEFT folder for vLLM and return its rank. Raises `GraftError` if vLLM cannot serve it."""
    model = loaded.base.model
    config = state_of(model).adapter(name).config
    kinds = sorted({part.kind for part in config.parts()})
    can_merge = all(part.folds for part in config.parts())
    way_out = (
        "merge it first (graft merge ... --to FOLDER) and evaluate the merged model with --base FOLDER --engine vllm"
        if can_merge
        else "leave out --engine vllm: Graft's own generation serves every kind"
    )
    if not set(kinds) <= {"lora", "pissa"}:
        what = "is of kind" if len(kinds) == 1 else "is a stack of"
        raise GraftError(
            f"adapter '{name}' {what} {' and '.join(kinds)}, but vLLM serves no kind of adapter other than LoRA; {way_out}"
        )
    export(model, name, folder, format="peft")
    written = read_json(folder / "adapter_config.json")
    refused = [words for field, words in NOT_PLAIN.items() if written.get(field)]
    if refused:
        raise GraftError(f"adapter '{name}' has {' and '.join(refused)}, which vLLM cannot serve; {way_out}")
    if written["r"] > RANKS[-1]:
        raise GraftError(f"adapter '{name}' has rank {written['r']}; vLLM serves at most {RANKS[-1]}; {way_out}")
    return int(written["r"])


def _max_lora_rank(rank: int) -> int:
    return next(allowed for allowed in RANKS if allowed >= rank)


def _base_path(loaded: LoadedModel) -> str:
    """Return the folder or hub name that the base was loaded from."""
    return str(getattr(loaded.base.model.config, "_name_or_path", "") or loaded.base.name)


def _answer(ids: list[int], stop_ids: frozenset[int]) -> Generated:
    """Wrap an answer of vLLM, without the stop token, which vLLM leaves at its end."""
    ended = bool(ids) and ids[-1] in stop_ids
    return Generated(tuple(ids[:-1] if ended else ids), "stopped" if ended else "truncated")
