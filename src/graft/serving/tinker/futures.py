"""The routes by which one poller waits for all samples of a sampler, and by which a client gives up a sample or shares a sampler."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.serving.errors import ApiError
from graft.serving.guarding import body_of
from graft.serving.tinker.bodies import FuturesBody, read
from graft.serving.tinker.drawing import Drawing
from graft.serving.tinker.promises import Promises, Record, Result, number_of
from graft.serving.tinker.service import HOLD, Service

GIVEN_UP = Result.failed("the sample was cancelled")


class Futures:
    """The handlers of these routes."""

    def __init__(self, service: Service, drawing: Drawing) -> None:
        self.service, self.drawing = service, drawing

    def add_to(self, app: Any) -> None:
        """Add the routes to an application."""
        for path, handler in (
            ("retrieve_futures", self.retrieve),
            ("cancel_future", self.cancel),
            ("join_sampling_session", self.join),
        ):
            app.add_route(f"/api/v1/{path}", handler, methods=["POST"])

    async def retrieve(self, request: Request) -> Response:
        """Say which samples of a sampler, or of one of its clones, have ended since a cursor; wait for one if there is none."""
        body = read(FuturesBody, await body_of(request))
        sampler, clone = body.target.sampling_session_id, body.target.cloned_sampler_id
        if sampler not in self.service.books.sampler:
            raise ApiError(404, f"there is no sampler {sampler[:200]!r}, or its session is over")
        got = [number_of(name) for name in body.retrieved_request_ids]

        def look(store: Promises) -> list[tuple[int, int, int | None]]:
            return store.ended(sampler, clone, body.prev_cursor)

        await self.service.store(lambda store: store.acknowledge(sampler, clone, body.prev_cursor, got))
        until = asyncio.get_running_loop().time() + min(HOLD, HOLD if body.timeout is None else body.timeout)
        while True:
            news = self.service.news_of(sampler)  # before the look, so that nothing is missed between the two
            found = await self.service.store(look)
            left = until - asyncio.get_running_loop().time()
            if found or left <= 0:
                break
            try:
                await asyncio.wait_for(news.wait(), left)
            except TimeoutError:
                break
        completions = [
            {"request_id": f"request-{number}", "state": "failed"}
            if size is None
            else {"request_id": f"request-{number}", "state": "finished", "response_payload_uncompressed_size": size}
            for _, number, size in found
        ]
        cursor = found[-1][0] if found else body.prev_cursor
        return JSONResponse({"completions": completions, "cursor": cursor})

    async def cancel(self, request: Request) -> Response:
        """Give up a sample. What is not a sample, or has ended, stays as it is."""
        name = str((await body_of(request)).get("request_id"))
        try:
            number = number_of(name)
        except KeyError as error:
            raise ApiError(404, f"there is no request {name[:200]!r}") from error
        if self.drawing.cancel(number):
            await self.service.settle({number: GIVEN_UP})
        return JSONResponse({})

    async def join(self, request: Request) -> Response:
        """Give one who shares a sampler a number of its own: its requests count from a thousand million times it."""
        name = str((await body_of(request)).get("sampling_session_id"))
        about = self.service.books.sampler.get(name)
        if about is None:
            raise ApiError(404, f"there is no sampler {name[:200]!r}, or its session is over")
        about["clones"] = number = about.get("clones", 0) + 1
        await self.service.put(Record("sampler", name, dict(about)))
        return JSONResponse({"client_counter": number})
