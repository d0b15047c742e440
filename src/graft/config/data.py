"""The block `data`: files, splits, templates, and what happens to samples that are too long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from graft.config.section import Place, Section

TASKS = Literal["causal", "classification", "regression", "seq2seq", "preference"]


class SourceConfig(Section):
    """One data set."""

    path: Place
    """A .json, .jsonl, .csv, .tsv, .parquet or .txt file (or one of these with .gz), a folder, or the name of a data set on the hub."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "completion"] = "auto"
    """Shape of the rows; auto tells it from their fields."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, from the name that the format expects to the name in the data: {instruction: question}."""
    ignore: list[str] = Field(default_factory=list)
    """Columns to leave out on purpose, although they would change what a sample means (`label`, `tools`, `weight`)."""
    split: str | None = None
    """Split of a hub data set; null is train."""
    name: str | None = None
    """Configuration of a hub data set."""
    encoding: str | None = None
    """Encoding of a file of text; null is UTF-8, or what a byte-order mark says."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Character between the cells of a CSV or TSV file; null is a comma or a tab."""
    quotes: bool | None = None
    """Whether cells of a CSV or TSV file may stand in quotation marks; null: CSV yes, TSV if it is written so."""
    columns: list[str] = Field(default_factory=list)
    """Names of the columns of a CSV or TSV file without a header."""
    weight: float = Field(default=1.0, gt=0)
    """How often each of its samples is seen per epoch, relative to the other data sets."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows to read, from the start; null reads all."""


class GivenSource(SourceConfig):
    """A data set that is named on the command line, beside what a run says about its own data."""

    own_fields: dict[str, str] = Field(default_factory=dict)
    """The `fields` of the run; each is used where the data have its column."""
    option: str | None = "--fields"
    """The option that renames columns; None where there is none."""

    def renames(self, columns: list[str]) -> dict[str, str]:
        """Return the columns to rename of data with these columns."""
        return {**{ours: theirs for ours, theirs in self.own_fields.items() if theirs in columns}, **self.fields}


def _source_type(value: Any) -> str | None:
    """Return the tag of the union member that a value is meant to be; None if it is none of them."""
    if isinstance(value, (dict, SourceConfig)):
        return "source"
    if isinstance(value, (list, tuple)):
        return "list"
    if isinstance(value, bool):
        return None
    return {str: "path", int: "count", float: "fraction", type(None): "none"}.get(type(value))


def _union(allowed: str) -> Discriminator:
    """Tell the members of a union apart by type alone, so that an error message is about the member that was meant."""
    return Discriminator(_source_type, custom_error_type="wrong_type", custom_error_message=f"must be {allowed}")


PathText = Annotated[Place, Tag("path")]
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
    """The training data, how they are rendered as text, and which tokens count in the loss."""

    train: Sources
    """A file or hub name; a mapping with a path and options; or a list of these."""
    task: TASKS = "causal"
    """What the model learns: to continue a text (causal), to predict its class (classification) or a number (regression), to answer it with
    an encoder-decoder (seq2seq), or to prefer one answer to another (preference)."""
    labels: list[str | int | float] | dict[str | int | float, str] | None = None
    """The classes in their order, as the data write them, or a mapping from each to a name; null takes the labels in the data, sorted."""
    validation: Validation = None
    """Samples to hold out of the training data (a count, or a fraction below 1), or a data set of its own; 0 or null means none."""
    template: Place = "auto"
    """chat (the tokenizer's own), alpaca, llm-adapters, plain, or a file; auto is chat if the tokenizer has one, else alpaca."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """What the chat template reads besides the conversation, e.g. {enable_thinking: false}. It is saved with the adapter."""
    system: str | None = None
    """System prompt for samples that have none."""
    special_tokens: Literal["text", "tokens"] = "text"
    """What becomes of special tokens that the data spell, as <|item_1|> in an answer: they stay text, or they are the tokens. Saved with
    the adapter: its prompts are read alike."""
    max_length: int = Field(default=512, ge=2)
    """Maximum length of a sample in tokens, prompt and answer together."""
    overlong: Literal["error", "drop", "truncate_prompt", "split"] = "error"
    """What to do with a longer sample: stop with an error, drop it, cut its prompt (never an answer), or split plain text into pieces."""
    train_on: Literal["completion", "last", "all"] = "completion"
    """Tokens that count in the loss: every answer, the last answer, or all tokens (prompts too)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the split into training and validation data."""
    cache: bool = True
    """Whether to keep the tokenised data between runs, under a hash of data, tokenizer and template."""

    @property
    def base_task(self) -> str:
        """The task that the base is loaded for; preferences are learnt by a causal model."""
        return "causal" if self.task == "preference" else self.task
