"""The two routes that answer: /v1/chat/completions and /v1/completions.

Rendering and tokenising run in a worker thread, the model in the engine's; the event loop only passes on. A client that leaves frees its
rows, whether it streams or waits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from graft.bases.tokens import refuse_unknown
from graft.data.encoding import Span, encode
from graft.errors import GraftError
from graft.generation.prompts import request_of
from graft.generation.requests import Request
from graft.serving.bodies import Body, ChatBody, CompletionBody, read_body
from graft.serving.engine import Busy, Engine
from graft.serving.errors import ApiError
from graft.serving.guarding import body_of
from graft.serving.replies import Answer, Replies, prompt_tokens, usage_of
from graft.serving.served import Answerer, Served
from graft.serving.tickets import Mailbox, Piece, Ticket

MOST_PROMPTS = 128
MOST_NEW = 4096
"""New tokens of a chat answer for which the client names no limit, at most."""
GRACE = 20
"""Seconds that a stream may go on when the server stops."""


class Completions:
    """Answers requests of both routes."""

    def __init__(self, served: Served, engine: Engine) -> None:
        self.served, self.engine, self.tokenizer = served, engine, served.base.tokenizer

    async def chat(self, http: HttpRequest) -> Response:
        """Answer a conversation."""
        body: ChatBody = read_body(ChatBody, await body_of(http))
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        turns = body.turns()
        async with self.served.answering(body.model) as who:
            request = await self._prepared(
                who, lambda: request_of(self.served.base, who.template, who.adapter, turns), "messages"
            )
            settings = {"logprobs": bool(body.logprobs), "top_logprobs": body.top_logprobs or 0}
            tickets = self._submit(body, who, [request], settings)
            replies = Replies(self.tokenizer, True, body.model, who.fingerprint)
            if body.stream:
                scored = bool(body.logprobs)
                return self._streamed(
                    body, who, tickets, replies, lambda _, piece, first: replies.chat_delta(piece, scored, first)
                )
            answers = await self._collected(http, tickets)
        choices = [replies.chat_choice(each, bool(body.logprobs)) for each in answers]
        return JSONResponse(replies.whole(choices, _usage(tickets, answers)))

    async def completions(self, http: HttpRequest) -> Response:
        """Continue one or several texts."""
        body: CompletionBody = read_body(CompletionBody, await body_of(http))
        if not 1 <= len(body.prompts) <= MOST_PROMPTS:
            raise ApiError(
                400, f"prompt must hold 1 to {MOST_PROMPTS} prompts; given: {len(body.prompts)}", param="prompt"
            )
        scored = body.logprobs is not None
        settings = {"logprobs": scored, "top_logprobs": body.logprobs or 0}
        if body.echo and scored:
            settings |= {"prompt_logprobs": True, "top_prompt_logprobs": body.logprobs or 0}
        if not body.echo and body.max_tokens == 0:
            raise ApiError(400, "max_tokens is 0, which is for scoring a prompt with echo: true", param="max_tokens")
        if body.echo and body.stream:
            raise ApiError(400, "echo is not for streams: ask without stream", param="echo")
        async with self.served.answering(body.model) as who:
            requests = [
                await self._prepared(who, lambda text=each: self._continued(who, text), "prompt")
                for each in body.prompts
            ]
            tickets = self._submit(body, who, requests, settings)
            replies = Replies(self.tokenizer, False, body.model, who.fingerprint)
            if body.stream:
                return self._streamed(body, who, tickets, replies, _completion_deltas(replies, scored, body.n or 1))
            answers = await self._collected(http, tickets)
        choices = []
        for place, answer in enumerate(answers):
            ticket = tickets[place // tickets[0].sampling.n]
            ids, prompt = ticket.request.ids, None
            if body.echo:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                prompt = text, prompt_tokens(ids, ticket.samples[0].prompt)
            choices.append(replies.completion_choice(place, answer.text, answer.tokens, answer.end, scored, prompt))
        return JSONResponse(replies.whole(choices, _usage(tickets, answers)))

    async def _prepared(self, who: Answerer, make: Callable[[], Request], param: str) -> Request:
        """Make a request in a worker thread. Raises `ApiError` for a prompt that cannot be written or has no room."""
        try:
            request = await asyncio.to_thread(make)
        except GraftError as error:
            raise ApiError(400, str(error), param=param) from error
        if not request.ids:
            raise ApiError(400, "a prompt of no tokens cannot be answered", param=param)
        if who.context is not None and request.tokens > who.context:
            said = f"the prompt has {request.tokens} tokens, and the context {who.context}"
            raise ApiError(400, said, param=param, code="context_length_exceeded")
        return request

    def _continued(self, who: Answerer, prompt: str | list[int]) -> Request:
        """Return the request that continues a text, or token ids."""
        base = self.served.base
        if isinstance(prompt, str):
            most = who.context
            if most is not None and len(prompt) > 64 * (most + 64):  # no token is that long: not worth tokenising
                raise GraftError(
                    f"the prompt has {len(prompt):,} characters, far more than a context of {most} tokens holds"
                )
            ids = encode([Span(prompt)], self.tokenizer).ids
        else:
            ids = prompt
            rows = base.model.get_input_embeddings().weight.shape[0]
            if wrong := next((each for each in ids if not 0 <= each < rows), None):
                raise GraftError(f"there is no token {wrong}")
        refuse_unknown(base.model, base.name, self.tokenizer, max(ids, default=0), prompt=True)
        return Request(tuple(ids), who.adapter, frozenset(who.template.stop_ids(self.tokenizer)))

    def _submit(self, body: Body, who: Answerer, requests: Sequence[Request], settings: dict[str, Any]) -> list[Ticket]:
        """Hand the requests to the engine, all or none. They share a mailbox."""
        most, mailbox = who.context, Mailbox()
        tickets: list[Ticket] = []
        try:
            for request in requests:
                room = MOST_NEW if most is None else min(MOST_NEW, most - len(request.ids))
                if room < 1 and body.limit != 0:
                    said = f"the prompt fills the context of {most} tokens and leaves no room for an answer"
                    raise ApiError(400, said, code="context_length_exceeded")
                sampling = body.sampling(room, **settings)
                tickets.append(
                    self.engine.submit(request, sampling, mailbox, body.exact_logprobs, whole=not body.stream)
                )
        except BaseException as error:
            self._release(tickets)
            if isinstance(error, Busy):
                raise ApiError(
                    429,
                    f"{self.engine.most} requests are open, as many as this server takes",
                    code="rate_limit_exceeded",
                ) from error
            if isinstance(error, GraftError):
                raise ApiError(400, str(error)) from error
            raise
        return tickets

    def _release(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.engine.release(ticket)

    async def _collected(self, http: HttpRequest, tickets: Sequence[Ticket]) -> list[Answer]:
        """Wait for all samples of all tickets, or until the client leaves."""
        answering = asyncio.ensure_future(_answers(tickets))
        leaving = asyncio.ensure_future(_left(http))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ApiError(499, "the client left")
            return answering.result()
        except GraftError as error:
            raise ApiError(400, str(error)) from error
        finally:
            answering.cancel()
            leaving.cancel()
            self._release(tickets)

    def _streamed(
        self,
        body: Body,
        who: Answerer,
        tickets: Sequence[Ticket],
        replies: Replies,
        delta: Callable[[int, Piece, bool], dict[str, Any]],
    ) -> Response:
        """Return the pieces as they come. delta: (number of the ticket, piece, whether it is the sample's first) -> a choice."""

        async def events() -> AsyncIterator[str]:
            answers: dict[tuple[int, int], Answer] = {}
            try:
                async for place, piece in _pieces(tickets):
                    first = (place, piece.index) not in answers
                    answer = answers.setdefault((place, piece.index), Answer(piece.index))
                    answer.add(piece)
                    if piece.problem is not None:
                        yield json.dumps(ApiError(500, piece.problem).content)
                        return
                    yield replies.chunk([delta(place, piece, first)])
                if body.usage_in_stream:
                    yield replies.chunk([], _usage(tickets, list(answers.values())))
                yield "[DONE]"
            except GraftError as error:
                yield json.dumps(ApiError(400, str(error)).content)

        def over() -> None:
            self._release(tickets)
            self.served.adapters.release(who.parts)

        self.served.adapters.hold(who.parts)
        return _Stream(events(), over)


class _Stream(EventSourceResponse):
    """A stream of events that says when it is over, also where its client left before the first."""

    def __init__(self, events: AsyncIterator[str], over: Callable[[], None]) -> None:
        super().__init__(events, sep="\n", headers={"Cache-Control": "no-store"}, shutdown_grace_period=GRACE)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def _completion_deltas(replies: Replies, scored: bool, samples: int) -> Callable[[int, Piece, bool], dict[str, Any]]:
    """Return what writes the pieces of streamed completions; it counts the characters of each."""
    offsets: dict[int, int] = {}

    def delta(place: int, piece: Piece, first: bool) -> dict[str, Any]:
        index = place * samples + piece.index
        offset = offsets.get(index, 0)
        choice = replies.completion_choice(index, piece.text, piece.tokens, piece.end, scored, offset=offset)
        if scored:
            offsets[index] = offset + sum(map(len, choice["logprobs"]["tokens"]))
        return choice

    return delta


async def _answers(tickets: Sequence[Ticket]) -> list[Answer]:
    """Return all samples, ticket by ticket."""
    answers = [[Answer(index) for index in range(ticket.sampling.n)] for ticket in tickets]
    async for place, piece in _pieces(tickets):
        answers[place][piece.index].add(piece)
    found = [answer for own in answers for answer in own]
    if failed := next((each for each in found if each.problem is not None), None):
        raise ApiError(500, str(failed.problem))
    return found


async def _pieces(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of tickets that share a mailbox, each with the place of its ticket, until all samples have ended."""
    places = {ticket: place for place, ticket in enumerate(tickets)}
    while any(ticket.open for ticket in tickets):
        ticket, piece = await tickets[0].mailbox.take()
        yield places[ticket], piece


async def _left(http: HttpRequest) -> None:
    """Return when the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _usage(tickets: Sequence[Ticket], answers: Sequence[Answer]) -> dict[str, Any]:
    cached = sum(len(each.request.ids) for each in tickets if each.samples and each.samples[0].cached)
    return usage_of(sum(len(each.request.ids) for each in tickets), answers, cached)
