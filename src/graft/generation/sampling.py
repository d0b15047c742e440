"""How one request is answered in a running batch, and what comes back for each of its samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from graft.errors import GraftError
from graft.generation.requests import Request
from graft.generation.text_stream import TextStream

MOST_TOP = 128
"""Most alternatives of a token whose log-probabilities can be asked for."""
End = Literal["stop", "length", "no_room", "failed", "dropped"]


@dataclass(frozen=True)
class Sampling:
    """The decoding settings of one request. Log-probabilities are the model's own, at temperature 1, in nats."""

    max_tokens: int = 256
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Sample only from this many likeliest tokens; 0 is all of them."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Sample i of the request draws with seed + i, whatever else is in the batch."""
    n: int = 1
    """Samples from one reading of the prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, wherever the borders of tokens are."""
    logprobs: bool = False
    """Whether the log-probability of each token is kept."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are kept at each place, with their log-probabilities."""
    prompt_logprobs: bool = False
    """Whether the prompt is scored too."""
    top_prompt_logprobs: int = 0
    prompt_targets: tuple[tuple[int, ...], ...] = ()
    """Tokens whose log-probabilities are kept at each place of the prompt but the first; -1 is no token."""
    prompt_draws: int = 0
    """How many tokens are drawn, each by itself at this temperature, at each place of the prompt but the first."""

    def __post_init__(self) -> None:
        problems = {
            "max_tokens must be at least 0": self.max_tokens < 0,
            "temperature must be from 0 to 100": not 0 <= self.temperature <= 100,
            "top_k must be at least 0": self.top_k < 0,
            "top_p must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "n must be at least 1": self.n < 1,
            "seed must be from -2**63 to 2**63 - 1": not -(2**63) <= self.seed < 2**63 - self.n,
            "a stop text must not be empty": "" in self.stop,
            f"top_logprobs must be from 0 to {MOST_TOP}": not 0 <= self.top_logprobs <= MOST_TOP,
            "prompt_draws must be at least 0": self.prompt_draws < 0,
            f"top_prompt_logprobs must be from 0 to {MOST_TOP}": not 0 <= self.top_prompt_logprobs <= MOST_TOP,
        }
        for problem, found in problems.items():
            if found:
                raise GraftError(f"{problem} (given: {self})")

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of new tokens are wanted."""
        return self.logprobs or self.top_logprobs > 0

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are wanted."""
        return bool(self.prompt_logprobs or self.top_prompt_logprobs or self.prompt_targets or self.prompt_draws)


Top = tuple[tuple[int, float], ...]
"""The likeliest tokens of a place with their log-probabilities, likeliest first."""


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the tokens of a prompt. The first token has none: nothing predicts it."""

    logprobs: tuple[float | None, ...]
    top: tuple[Top | None, ...] = ()
    targets: tuple[tuple[float, ...], ...] = ()
    """Of `Sampling.prompt_targets`; 0 for no token."""
    draws: tuple[Top, ...] = ()
    """The tokens that were drawn at each place but the first, in any order, with their log-probabilities at temperature 1."""


@dataclass(eq=False)
class Sample:
    """One answer in the making. The batch adds to it; its owner reads."""

    request: Request
    sampling: Sampling
    index: int = 0
    ids: list[int] = field(default_factory=list)
    """The tokens so far, with the stop token or the tokens of the stop text that ended them."""
    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    end: End | None = None
    """stop: a stop token or text. length: the limit of new tokens or of the context. no_room: the prompt filled the context.
    failed: see `problem`. dropped: its owner did not want it any longer."""
    problem: str | None = None
    prompt: PromptScores | None = None
    stream: TextStream | None = None
    """The answer as text; None without a tokenizer."""
    cached: bool = False
    """Whether the prompt was read from the prefix cache."""
    owner: Any = None

    @property
    def answer_ids(self) -> list[int]:
        """The tokens without the stop token."""
        return self.ids[:-1] if self.ids and self.ids[-1] in self.request.stop_ids else self.ids
