"""The table of the adapter contract: one row is one adapter configuration on one model family.

Every variant (variants.py) meets every family that has what its kind declares that it `needs`. Every test of this folder reads the rows
from here; what does not apply to a row it reads off the config's own declaration (`starts_as_identity`, `folds`), never off the kind's
name. The bases are random and tiny: two layers of width 32 with four heads, grouped queries where the family has them, weights large
enough that every adapter shows.

Legend: B rows of a batch, L length, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graft
from graft.adapters.base import AdapterConfig
from graft.adapters.parsing import parse
from graft.adapters.presets import Preset
from tests.contract.variants import OF_FAMILY, VARIANTS

VOCABULARY, PAD = 61, 0
ENDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILIES: dict[str, tuple[type[nn.Module], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**ENDS, **GROUPED)),
    "bloom": (BloomForCausalLM, BloomConfig(**ENDS, hidden_size=32, n_layer=2, n_head=4)),
    "gptj": (GPTJForCausalLM, GPTJConfig(**ENDS, **GPT, **NO_DROPOUT, rotary_dim=4)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**ENDS, **GPT, **NO_DROPOUT)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**ENDS, **GROUPED, head_dim=8)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**ENDS, **GROUPED, head_dim=8, sliding_window=6)),
    "bert": (BertForMaskedLM, BertConfig(**ENDS, **WIDE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "t5": (T5ForConditionalGeneration, T5Config(**ENDS, **T5, feed_forward_proj="gated-gelu")),
}
NOISE = {"t5": 0.1}
"""How far `attached` moves an adapter from its start, where it is not 0.2: T5 does not scale its scores down."""
CAUSAL = frozenset(FAMILIES) - {"bert", "t5"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    family: str
    variant: str
    spec: Any

    @property
    def id(self) -> str:
        """What pytest prints."""
        return f"{self.family}-{self.variant}"

    @property
    def config(self) -> AdapterConfig:
        """The config as it meets this family."""
        parsed = parse(self.spec)
        return parsed.resolve(graft_names(self.family)) if isinstance(parsed, Preset) else parsed

    @property
    def causal(self) -> bool:
        """Whether the family generates."""
        return self.family in CAUSAL


@functools.cache
def graft_names(family: str) -> frozenset[str]:
    """The site names of a family."""
    return frozenset(graft.sites(pristine(family)))


@functools.cache
def pristine(family: str, attention: str | None = None, layers: int = 2) -> Any:
    """The one base of a family; copy it before changing it."""
    cls, config = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        made = copy.deepcopy(config)
        made._attn_implementation = attention  # None: the family's own choice
        made.num_hidden_layers = layers
        model: Any = cls(made)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1 if family == "t5" else 0.25)  # T5 does not scale its scores down
                elif "norm" in name or "ln_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.normal_(std=0.1)
    return model.eval()


def applies(family: str, spec: Any) -> bool:
    """Whether a family has what the kinds of a configuration declare that they need."""
    needed = {name for part in Row(family, "", spec).config.parts() for name in part.needs}
    return needed <= graft_names(family)


ROWS: tuple[Row, ...] = tuple(
    Row(family, variant, spec)
    for family in FAMILIES
    for variant, spec in {**VARIANTS, **OF_FAMILY.get(family, {})}.items()
    if applies(family, spec)
)


def _default() -> frozenset[str]:
    """Rows of the default suite: the first two variants of each kind, each on one family in turn, and each family's first own variant."""
    by_kind: dict[str, list[str]] = {}
    for variant, spec in VARIANTS.items():
        by_kind.setdefault(Row("llama", variant, spec).config.kind, []).append(variant)
    chosen = {f"{family}-{next(iter(own))}" for family, own in OF_FAMILY.items()}
    for turn, variants in enumerate(by_kind.values()):
        for number, variant in enumerate(variants[:2]):
            fitting = [row.id for row in ROWS if row.variant == variant]
            chosen.add(fitting[(turn + 3 * number) % len(fitting)])
    return frozenset(chosen)


DEFAULT = _default()


def row_of(wanted: str) -> Row:
    """One row by its id."""
    return next(row for row in ROWS if row.id == wanted)


def rows(select: str | Iterable[str] = "", where: Any = None) -> pytest.MarkDecorator:
    """Parametrise a test over the rows with these ids for which `where` holds; without ids over all, of which most are slow."""
    wanted = select.split() if isinstance(select, str) else list(select)
    unknown = set(wanted) - {row.id for row in ROWS}
    assert not unknown, f"no such rows: {sorted(unknown)}"
    chosen = [row for row in ROWS if (not wanted or row.id in wanted) and (where is None or where(row))]
    slow = {row.id for row in chosen if not wanted and row.id not in DEFAULT}
    marked = [pytest.param(row, id=row.id, marks=pytest.mark.slow if row.id in slow else ()) for row in chosen]
    return pytest.mark.parametrize("row", marked)


def base(family: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A base of one's own, in evaluation mode."""
    return copy.deepcopy(pristine(family, attention)).to(dtype)


def attached(
    row: Row, attention: str | None = None, dtype: torch.dtype = torch.float32, *names: str, fresh: bool = False
) -> Any:
    """A base with the row's adapter under each name (default "a"), each with weights of its own, in evaluation mode."""
    model = base(row.family, attention, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        graft.attach(model, {name: row.spec for name in names or ("a",)})
    if not fresh:
        for number, name in enumerate(names or ("a",)):
            randomise(model, name, number, NOISE.get(row.family, 0.2))
    return model


def randomise(model: nn.Module, name: str, seed: int = 0, size: float = 0.2) -> None:
    """Move every parameter of an adapter away from its start, as training would."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for _, parameter in graft.parameters(model, name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)


def ids(rows: int = 3, length: int = 7, seed: int = 5) -> Tensor:
    """Token ids [B, L] without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def outputs(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    """[B, L, V]; an encoder-decoder reads the same tokens on both sides."""
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = inputs
    return model(input_ids=inputs, **kwargs).logits


def logits(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    """[B, L, V] without gradients."""
    with torch.no_grad():
        return outputs(model, inputs, **kwargs)


def loss(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    """A scalar that depends on every token's output."""
    out = outputs(model, inputs, **kwargs)
    return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten())


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the base alone."""
    for name, tensor in model.state_dict().items():
        if "graft" not in name.split("."):
            yield name, tensor


def same_base(model: nn.Module, family: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the base is what it was, bit for bit, name for name."""
    original = pristine(family, attention).state_dict()
    now = dict(base_tensors(model))
    return list(now) == list(original) and all(
        torch.equal(tensor, original[name].to(dtype)) for name, tensor in now.items()
    )


def changes(model: nn.Module, row: Row) -> bool:
    """Whether the active adapter shows in the output."""
    inputs = ids()
    return not torch.allclose(logits(model, inputs), logits(pristine(row.family), inputs), atol=1e-3)
