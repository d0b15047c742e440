"""The block `eval`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graft.config.section import Section


class EvalConfig(Section):
    """What is evaluated, and how answers are generated and compared."""

    tasks: list[str] = Field(default_factory=list)
    """Benchmarks, or groups of them, that `graft eval` asks; none evaluates on a data file."""
    protocol: str = "strict"
    """How benchmarks are asked and judged: llm-adapters, strict, math-verify, rank or bleu."""
    data: str | None = None
    """Folder that holds the benchmarks' files; null reads them from the hub."""
    limit: int | None = Field(default=None, ge=1)
    """Samples to evaluate, from the start; null evaluates all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer on data files, in tokens; the protocol of a benchmark says its own."""
    metric: Literal["auto", "exact", "numeric"] = "auto"
    """How an answer is compared on data files: as text, or by its last number; auto is numeric where every reference has a number."""
    token_budget: int = Field(default=8192, ge=1)
    """Tokens per generation batch, prompts and room for the answers together."""
