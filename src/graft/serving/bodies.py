"""The bodies of /v1/chat/completions and /v1/completions. Every field is used, is a label, or is an error that names it.

Beyond OpenAI's fields there are `top_k` and `exact_logprobs` (log-probabilities by the trainer's own pass).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from graft.data.samples import Message
from graft.data.turns import HANDED, OPENAI
from graft.generation.sampling import Sampling
from graft.serving.errors import ApiError
from graft.utils.strict import Strict, described

LABELS = frozenset(
    {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "store"}
)
"""Fields for the books of whoever serves. They change no answer, so they are taken and dropped."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are not supported, and their values that change nothing."""
MOST_SAMPLES = 128


class StreamOptions(Strict):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Body(Strict):
    """What both routes take."""

    model: str = Field(max_length=500)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_SAMPLES)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    exact_logprobs: bool = False

    def sampling(self, room: int, **more: Any) -> Sampling:
        """Return the decoding settings. room: most new tokens where the client names no limit. Raises `GraftError` for wrong values."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=secrets.randbits(32) if self.seed is None else self.seed,
            n=self.n or 1,
            stop=tuple(stop),
            max_tokens=room if (limit := self.limit) is None else min(limit, max(room, 1)),
            **more,
        )

    @property
    def limit(self) -> int | None:
        """Most new tokens, None if the client names no limit."""
        raise NotImplementedError

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> list[Message]:
        """Return the conversation. Raises `ApiError` for turns that are not text."""
        return [_turn(number, each) for number, each in enumerate(self.messages)]


class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None

    @property
    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as token ids."""
        given: Any = self.prompt
        many = isinstance(given, list) and (not given or not isinstance(given[0], int))
        return given if many else [given]


def read_body(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """Return a body of this kind. Raises `ApiError` for fields that are unknown, not supported or wrong."""
    left: dict[str, Any] = {}
    for name, value in fields.items():
        if name in LABELS or (value is None and name in NEUTRAL):
            continue
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise ApiError(
                    400, f"{name} is not supported here: leave it out (given: {str(value)[:60]})", param=name
                )
            continue
        left[name] = value
    try:
        body = kind.model_validate(left)
    except ValidationError as error:
        where = error.errors()[0]["loc"]
        raise ApiError(400, described(error, kind.model_fields), param=str(where[0]) if where else None) from error
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options is for streams: set stream to true, or leave it out", param="stream_options"
        )
    if body.exact_logprobs and (body.stream or body.logprobs is None or body.logprobs is False):
        raise ApiError(
            400, "exact_logprobs needs logprobs, and no stream, since it scores whole answers", param="exact_logprobs"
        )
    return body


def _turn(number: int, turn: Mapping[str, Any]) -> Message:
    """Read one turn. Keys that a chat template may read are handed to it."""
    where = f"messages[{number}]"
    unknown = [key for key in turn if key not in ("role", "content", "refusal", *HANDED)]
    if unknown:
        raise ApiError(400, f"{where} has the unknown field '{unknown[0][:60]}'", param="messages")
    role: Any = OPENAI.get(turn["role"]) if isinstance(turn.get("role"), str) else None
    if role is None:
        raise ApiError(
            400,
            f"{where}: role must be one of {', '.join(OPENAI)}; given: {str(turn.get('role'))[:60]}",
            param="messages",
        )
    extra = {key: turn[key] for key in HANDED if turn.get(key) is not None}
    content = _content(where, turn.get("content"), bool(extra.get("tool_calls")))
    message: Message = {"role": role, "content": content}
    return {**message, "extra": extra} if extra else message


def _content(where: str, content: Any, may_be_empty: bool) -> str:
    """Return the text of a turn: a text, or a list of parts of type text."""
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ApiError(400, f"{where}: content must be text, or a list of parts of type text", param="messages")
