"""A prompt on any causal model equals its text before the sequence: by cached keys, or, where layers keep a state, for real."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graft
from graft.attaching.active import running
from graft.attention.leading import LeadsWithPrompts
from graft.injection.arguments import cache_name, cache_of
from graft.routing.context import ForwardContext
from tests.architectures import TYPES, UNBUILT, build

TEXT, IDS = (5, 9, 7), torch.arange(20, 32).view(2, 6)
PROMPT = {"kind": "prompt", "tokens": 3, "init": "text", "init_ids": TEXT}
SHORT = {"kind": "prompt", "tokens": 2, "init": "text", "init_ids": TEXT[:2]}
STATEFUL = ["falcon_h1", "lfm2_moe", "mamba2", "nemotron_h", "rwkv", "zamba"]
OTHERS = {
    "gemma3n_text": "each layer adds something of a token's id, and virtual tokens have none",
    "gemma4_text": "as above; they get that of padding",
    "gemma4": "as above",
}
"""Types on which a prompt that starts from a text is not that text, with the reason."""


def logits(model: Any, ids: torch.Tensor = IDS, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False, **given)
    return out.logits if hasattr(out, "logits") else out[0]


def large(name: str) -> Any:
    model = build(name).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in STATEFUL else [pytest.mark.slow]) for name in TYPES if name not in UNBUILT],
)
def test_a_prompt_from_a_text_is_the_text_before_the_sequence_or_is_refused(name: str) -> None:
    model = large(name)
    if model.config.is_encoder_decoder or name in OTHERS:
        pytest.skip(OTHERS.get(name, "its prompt is in the encoder"))
    wanted = logits(model, torch.cat([torch.tensor([TEXT]).expand(2, -1), IDS], 1))[:, 3:]
    try:
        graft.attach(model, {"a": PROMPT})
    except graft.GraftError:
        assert name not in STATEFUL
        return
    assert_near(logits(model), wanted)


@pytest.mark.parametrize("name", STATEFUL)
def test_rows_padding_and_caches_of_a_model_with_a_state(name: str) -> None:
    model = large(name)
    bare = logits(model)
    graft.attach(model, {"a": PROMPT, "b": SHORT})
    owner = next(module for module in model.modules() if isinstance(module, LeadsWithPrompts))
    wanted = {"a": logits(model), None: bare}
    with graft.use(model, "b"):
        wanted["b"] = logits(model)
    for rows in (("b", "a"), (None, "a")):
        with graft.route(model, rows):
            if not owner.__dict__["graft_masks"]:
                with pytest.raises(graft.GraftError, match="does not mask padding"):
                    logits(model)
                continue
            for number, row in enumerate(logits(model)):
                assert_near(row, wanted[rows[number]][number])
            for number, row in enumerate(stepwise(model)):
                assert_near(row, wanted[rows[number]][number, 4:])
    if name != "rwkv":  # transformers' RWKV itself gives other logits with its cache
        assert_near(stepwise(model), wanted["a"][:, 4:])
    if owner.__dict__["graft_masks"]:
        mask = torch.nn.functional.pad(torch.ones_like(IDS), (2, 0))
        assert_near(logits(model, torch.nn.functional.pad(IDS, (2, 0)), attention_mask=mask)[:, 2:], wanted["a"])
    flat = ForwardContext("a", lengths=(6, 6), flat=True)
    with pytest.raises(graft.GraftError, match="padding-free"), running(model, flat):
        logits(model, IDS.view(1, -1))
    graft.detach(model)
    assert torch.equal(logits(model), bare)


def stepwise(model: Any) -> torch.Tensor:
    """The logits of the last two tokens, which run one by one with a cache."""
    found, mask = [], torch.ones_like(IDS)
    with torch.no_grad():
        out = model(input_ids=IDS[:, :4], attention_mask=mask[:, :4], use_cache=True)
        for at in (4, 5):
            cache = cache_of(out)
            name = "state" if cache is None else cache_name(type(model).forward) or "past_key_values"
            given = {name: out.state if cache is None else cache}
            out = model(input_ids=IDS[:, at : at + 1], attention_mask=mask[:, : at + 1], use_cache=True, **given)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1)
