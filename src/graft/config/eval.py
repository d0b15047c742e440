"""The block `eval`: benchmarks, and how answers are generated and compared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graft.config.section import Place, Section


class EvalConfig(Section):
    """What to evaluate, and how answers are generated and compared."""

    tasks: list[str] = Field(default_factory=list)
    """Benchmarks, or groups of them, that `graft eval` runs; an empty list evaluates on a data file."""
    protocol: str = "strict"
    """How benchmarks are asked and judged: llm-adapters, strict, math-verify, rank or bleu."""
    data: Place | None = None
    """Folder with the files of the benchmarks; null reads them from the hub."""
    limit: int | None = Field(default=None, ge=1)
    """Number of samples to evaluate, from the start; null evaluates all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum length of an answer on data files, in tokens; for benchmarks the protocol sets it."""
    metric: Literal["auto", "exact", "numeric", "text"] = "auto"
    """How answers on data files are compared: exact, as text; numeric, by the number they give; text, as free text, by BLEU, ROUGE and
    perplexity too; auto is numeric if every reference is a number, else exact."""
    token_budget: int = Field(default=8192, ge=1)
    """Tokens per generation batch: the prompts and the room for their answers together."""
