"""Answers by vLLM (github.com/vllm-project/vllm), for the bare base and for LoRAs beside it.

Adapters go to vLLM as PEFT folders (`graft.export`). It holds plain LoRA of one rank and one alpha; whatever else folds into the
weights is merged first (`graft merge`) and is then a base like any other. Prompts and answers are tokens, as in Graft's
own generation, and only a request's own stop tokens end its answer. vLLM's beam search scores and stops by other rules than
transformers', so beams are refused: a protocol that wants them would not get them.

Called are `vllm.LLM`, `vllm.SamplingParams` and `vllm.lora.request.LoRARequest` as vLLM 0.8 to 0.22 document them.
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
"""What vLLM's max_lora_rank may be."""
AT_ONCE = 256
"""Requests between two writes of answers."""
NOT_PLAIN = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases of the LoRA",
    "modules_to_save": "whole modules beside the LoRA",
    "rank_pattern": "LoRAs of several ranks",
    "alpha_pattern": "LoRAs of several alphas",
    "trainable_token_indices": "rows of the embedding",
}
"""Fields of a PEFT folder that vLLM refuses or does not read, and what they stand for."""


class VLLM:
    """vLLM with the base of a bench and its adapters. The bench's own copy of the base may lie on the CPU: it makes no answers."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Raises `MissingExtra` without vLLM, and `GraftError` for an adapter that it cannot serve, with the reason."""
        self._vllm: Any = require("vllm", "vllm")
        self._requests: Any = require("vllm.lora.request", "vllm")
        self.name = f"vllm {self._vllm.__version__}"
        self._model = loaded.base.model
        folder = Path(tempfile.mkdtemp(prefix="graft-vllm-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        names = [each.adapter for each in loaded.adapters if each.adapter is not None]
        ranks = [_exported(loaded, name, folder / name) for name in names]
        self._loras = {
            name: self._requests.LoRARequest(name, number, str(folder / name))
            for number, name in enumerate(names, start=1)
        }
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room_for(max(ranks))} if ranks else {}
        self._llm = self._vllm.LLM(
            model=_where(loaded), dtype=str(loaded.base.dtype).removeprefix("torch."), skip_tokenizer_init=True, **lora
        )

    def check(self, requests: Sequence[Request], token_budget: int) -> int:
        """Nothing is proved of another program."""
        return 0

    def answers(
        self, requests: Sequence[Request], decoding: Decoding, token_budget: int
    ) -> Iterator[tuple[int, Generated]]:
        """vLLM fills its batches itself: the token budget is Graft's own generation's. Raises `GraftError` for beams."""
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
    """Write a LoRA where vLLM reads it; returns its rank."""
    model = loaded.base.model
    config = state_of(model).adapter(name).config
    kinds = sorted({part.kind for part in config.parts()})
    merging = all(part.folds for part in config.parts())
    way_out = (
        "merge it first (graft merge ... --to FOLDER) and evaluate the merged model with --base FOLDER --engine vllm"
        if merging
        else "leave out --engine vllm: Graft's own generation serves every kind"
    )
    if not set(kinds) <= {"lora", "pissa"}:
        what = "is" if len(kinds) == 1 else "holds"
        raise GraftError(
            f"adapter '{name}' {what} {' and '.join(kinds)}, and vLLM computes no adapter but LoRA beside a base; {way_out}"
        )
    export(model, name, folder, format="peft")
    written = read_json(folder / "adapter_config.json")
    stuck = [words for field, words in NOT_PLAIN.items() if written.get(field)]
    if stuck:
        raise GraftError(f"adapter '{name}' has {' and '.join(stuck)}, which vLLM cannot serve; {way_out}")
    if written["r"] > RANKS[-1]:
        raise GraftError(f"adapter '{name}' has rank {written['r']}; vLLM serves at most {RANKS[-1]}; {way_out}")
    return int(written["r"])


def _room_for(rank: int) -> int:
    return next(allowed for allowed in RANKS if allowed >= rank)


def _where(loaded: LoadedModel) -> str:
    """The folder or hub name that the base was loaded from."""
    return str(getattr(loaded.base.model.config, "_name_or_path", "") or loaded.base.name)


def _answer(ids: list[int], stop_ids: frozenset[int]) -> Generated:
    """vLLM leaves the token that ended an answer in it."""
    ended = bool(ids) and ids[-1] in stop_ids
    return Generated(tuple(ids[:-1] if ended else ids), "stopped" if ended else "truncated")
