"""Write base and adapter as one plain Hugging Face model, and prove that it is equal before it counts.

The merged model is loaded again, and its logits on a few prompts are compared with those of the adapter on its base. The target folder
appears only if they agree.

Legend: L tokens of a prompt, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import CannotFold
from graft.attaching.active import use
from graft.attaching.attach import detach
from graft.attaching.merge import followers, installs_by_host, merge
from graft.bases.dequantising import dequantise
from graft.bases.into_bits import BitsReport, IntoBits, before_merging, bring_into_bits
from graft.bases.loading import LABELLED, Base, load_model
from graft.bases.memory import memory_report
from graft.bases.quantised import Quantised, quantised
from graft.config.base import BaseConfig
from graft.errors import GraftError
from graft.injection.state import state_of
from graft.utils.files import new_dir

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""The largest difference between logits that rounding explains, relative to 1 + the largest logit."""


@dataclass(frozen=True)
class MergeReport:
    """How the merged model compares with the adapter on its base."""

    folder: str
    adapter: str
    dtype: str
    prompts: int
    tokens: int
    max_difference: float
    """The largest absolute difference between logits."""
    mean_difference: float
    largest_logit: float
    same_next_token: float
    """The share of positions at which both rank the same token first."""
    dequantised: str | None
    """How the base was quantised, None if it was not. The merged model is not."""
    untied: tuple[str, ...]
    """Weights that were tied to another module and are now separate."""
    few_bits: BitsReport | None = None
    """What was kept of the adapter, if the merged model is in few bits."""


def write_merged(
    base: Base,
    name: str,
    prompts: Sequence[Sequence[int]],
    target: str | Path,
    add_files: Callable[[Path], object] | None = None,
    into: IntoBits | None = None,
) -> MergeReport:
    """Fold an adapter into its base for good, and write the model and tokenizer to a new or empty folder.

    base: is used up; afterwards it holds the merged weights, and no adapter. prompts: token ids to compare the logits on. add_files: a
    function that adds files to the folder before the folder takes its place.
    into: bring the merged model into few bits; it is then in memory in float32 for a while.
    A base in few bits is dequantised first; what is compared is the adapter on the base as it was, or the model in few bits.
    Raises `CannotFold` for a kind that no weights can express, and `GraftError` for a folder that is not empty, for weights that cannot be
    dequantised, and if the reloaded model answers differently.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GraftError(f"{target} is not empty: name a new folder for the merged model")
    model = base.model
    _refuse_unfoldable(model, name)
    untied = _untie(model, name)
    # The expected logits are computed before the merge, which overwrites the weights.
    with use(model, name):
        expected = _logits(model, prompts)
    before = None if into is None else before_merging(model, name, into, base.task in LABELLED)
    if (held := quantised(model)) is not None:
        dequantise(model, base.dtype if into is None else torch.float32)
    if into is not None:
        model.float()
    merge(model, name, keep=False)
    detach(model)
    bits = None
    if into is not None and before is not None:
        bits = bring_into_bits(model, into, before, base.dtype)
        expected = _logits(model, prompts)
    with new_dir(target) as folder:
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        if add_files is not None:
            add_files(folder)
        # If the comparison fails, `new_dir` removes what was written.
        report = _compare(base, name, folder, target, expected, prompts, untied, held)
    return replace(report, few_bits=bits)


def _refuse_unfoldable(model: nn.Module, name: str) -> None:
    config = state_of(model).adapter(name).config
    stuck = sorted({part.kind for part in config.parts() if not part.folds})
    if stuck:
        raise CannotFold(
            f"adapter '{name}' cannot be merged: {' and '.join(stuck)} adapters compute what the base's weights cannot express. Keep it "
            "as an adapter, which costs little: graft chat, predict and eval load it from its folder, and so does graft.load in Python"
        )


def _untie(model: Any, name: str) -> tuple[str, ...]:
    """Give each adapted module a weight of its own if it shares one with a module that the adapter does not change alike.

    An output head that shares the embedding's weight keeps it where the adapter changes both by one difference. Return the names.
    """
    by_host = installs_by_host(state_of(model).adapter(name))
    alike = followers(model, by_host)
    own: list[str] = []
    for names in memory_report(model).tied:
        hosts = [host for host in by_host if f"{host}.weight" in names]
        if len(alike.intersection(each.removesuffix(".weight") for each in names)) < len(names) - 1:
            own += [f"{host}.weight" for host in hosts]
    for path in own:
        module = model.get_submodule(path.removesuffix(".weight"))
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    if own:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return tuple(sorted(own))


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return each prompt's logits in float32 on the CPU: [L, V], or [1, C] for a classifier. An encoder-decoder reads it on both sides."""
    found = []
    with torch.no_grad():
        for each in prompts:
            ids = torch.tensor([list(each)], device=model.device)
            written = (
                {"decoder_input_ids": ids} if hasattr(model, "lm_head") and model.config.is_encoder_decoder else {}
            )
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **written)
            found.append(out.logits.flatten(0, -2).float().cpu())
    return found


def _compare(
    base: Base,
    name: str,
    folder: Path,
    target: Path,
    expected: list[Tensor],
    prompts: Sequence[Sequence[int]],
    untied: tuple[str, ...],
    held: Quantised | None,
) -> MergeReport:
    """Load the merged model and compare its logits with the expected ones. Raises `GraftError` if rounding does not explain the gap."""
    dtype = str(base.dtype).removeprefix("torch.")
    labels = base.model.config.id2label if base.task == "classification" else {}
    saved = BaseConfig(model=str(folder.resolve()), dtype=dtype, device=str(base.device))  # pyright: ignore
    again = load_model(saved, base.task, [labels[number] for number in sorted(labels)])
    pairs = list(zip(expected, _logits(again, prompts), strict=True))
    differences = torch.cat([(one - other).abs().flatten() for one, other in pairs])
    largest = max(float(one.abs().max()) for one, _ in pairs)
    same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs])
    report = MergeReport(
        str(target), name, dtype, len(prompts), len(same), float(differences.max()), float(differences.mean()), largest,
        float(same.float().mean()), None if held is None else held.method, untied,
    )  # fmt: skip
    rough = held is not None and held.compute == "bfloat16"  # the quantised layers rounded more than the plain ones do
    allowed = ALLOWED[torch.bfloat16 if rough else base.dtype] * (1 + largest)
    if not report.max_difference <= allowed:
        raise GraftError(
            f"the merged model answers differently from the adapter: logits differ by up to {report.max_difference:.3g}, but rounding to "
            f"{dtype} explains only {allowed:.3g}. Nothing was written; "
            + ("merge in float32 (--dtype float32), or keep" if base.dtype != torch.float32 else "keep")
            + " the adapter as it is"
        )
    return report
