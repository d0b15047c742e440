"""What is trained on (`data`): files, splits, how samples are written out, which of them fit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from graft.config.section import Section

TASKS = Literal["causal", "classification", "regression", "seq2seq", "preference"]


class SourceConfig(Section):
    """One data set."""

    path: str = Field(min_length=1)
    """A .json, .jsonl, .csv or .parquet file, or the name of a data set on the hub."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "completion"] = "auto"
    """Shape of the rows; auto tells it from their fields."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, from the name the format expects to the name in the data: {instruction: question}."""
    split: str | None = None
    """Split of a hub data set; null is train."""
    name: str | None = None
    """Configuration of a hub data set."""
    weight: float = Field(default=1.0, gt=0)
    """How often each of its samples is seen per epoch, relative to the other data sets."""
    limit: int | None = Field(default=None, ge=1)
    """Rows to read from the start; null reads all."""


def _source_type(value: Any) -> str | None:
    """Which member of a union of sources a value is meant to be (None: no member)."""
    if isinstance(value, (dict, SourceConfig)):
        return "source"
    if isinstance(value, (list, tuple)):
        return "list"
    if isinstance(value, bool):
        return None
    return {str: "path", int: "count", float: "fraction", type(None): "none"}.get(type(value))


def _union(allowed: str) -> Discriminator:
    """Tells the members of a union apart by type alone, so that an error is about the member that was meant."""
    return Discriminator(_source_type, custom_error_type="wrong_type", custom_error_message=f"must be {allowed}")


PathText = Annotated[str, Tag("path"), Field(min_length=1)]
Source = Annotated[SourceConfig, Tag("source")]
OneSource = Annotated[PathText | Source, _union("a path, or a mapping with a path")]
Sources = Annotated[
    PathText | Source | Annotated[list[OneSource], Tag("list"), Field(min_length=1)],
    _union("a path, a mapping with a path, or a list of these"),
]
Validation = Annotated[
    PathText
    | Source
    | Annotated[int, Tag("count"), Field(ge=0)]
    | Annotated[float, Tag("fraction"), Field(ge=0, lt=1)]
    | Annotated[None, Tag("none")],
    _union("a number of samples, a fraction of the training data, a path, a mapping with a path, or null"),
]


class DataConfig(Section):
    """What is trained on, how it is written out, and which tokens count."""

    train: Sources
    """A file or hub name; a mapping with a path and options; or a list of these."""
    task: TASKS = "causal"
    """What is learnt: to continue a text (causal), its class (classification), a number (regression), to answer it with an
    encoder-decoder (seq2seq), or to prefer one answer to another (preference)."""
    labels: list[str | int] | dict[str | int, str] | None = None
    """Classes in their order, as the data has them, or a name for each; null takes what the data holds, sorted."""
    validation: Validation = None
    """Samples held out of the training data (a count, or a fraction below 1), or its own data set; 0 or null: none."""
    template: str = Field(default="auto", min_length=1)
    """chat (the tokenizer's own), alpaca, llm-adapters, plain, or a file; auto is chat where there is one, else alpaca."""
    system: str | None = None
    """System prompt for samples that bring none."""
    max_length: int = Field(default=512, ge=2)
    """Longest sample, in tokens, prompt and answer together."""
    overlong: Literal["error", "drop", "truncate_prompt"] = "error"
    """What happens to a longer sample: stop, leave it out, or cut its prompt. An answer is never cut."""
    train_on: Literal["completion", "last", "all"] = "completion"
    """Tokens that count in the loss: every answer, the last answer, or all tokens (prompts too)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split into training and validation."""
    cache: bool = True
    """Keep the tokenised data between runs, under a hash of data, tokenizer and template."""

    @property
    def base_task(self) -> str:
        """The task that the base is loaded for: preferences are learnt by a causal model."""
        return "causal" if self.task == "preference" else self.task
