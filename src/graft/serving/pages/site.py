"""The routes of the pages. They are rendered here with Jinja; a few lines of script exchange the parts that are live.

Whatever a file says is escaped. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from graft.errors import GraftError
from graft.evaluation.differences import compare
from graft.generation.candidates import Candidate
from graft.serving.errors import ApiError
from graft.serving.guarding import bytes_of
from graft.serving.pages import actions, queue, reading
from graft.serving.pages.reading import Shelf
from graft.serving.pages.session import COOKIE, session_of
from graft.study.report.sides import rank_sides

HERE = Path(__file__).parent
SECONDS = 1.0
"""How often the files of a live page are looked at."""
MOST_FORM = 1_000_000
OPEN_PATHS = ("/login", "/static/")
"""What is shown to who has not signed in."""
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'"


class Pages:
    """The pages of a folder, of a server, or of both."""

    def __init__(
        self,
        shelf: Shelf | None,
        token: str | None,
        models: Callable[[], Awaitable[Sequence[Candidate]]] | None = None,
        base: str = "",
        state: Path | None = None,
    ) -> None:
        """models: who can be chatted with now; None without a server. state: the folder of a training service."""
        self.shelf, self.token, self.models, self.state = shelf, token, models, state
        files = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)
        files.globals |= {
            "has_runs": shelf is not None,
            "has_chat": models is not None,
            "has_queue": state is not None,
            "base": base,
            "may_act": token is not None,
        }
        files.filters |= {"percent": _percent, "number": _number}
        self._files = files
        self._drawing = asyncio.Lock()  # matplotlib draws one picture at a time

    def add_to(self, app: FastAPI) -> None:
        """Put the routes into an application."""
        app.mount("/static", StaticFiles(directory=HERE / "static"))
        pages: dict[str, Callable[..., Any]] = {"/": self.index, "/login": self.login}
        if self.models is not None:
            pages |= {"/chat": self.chat, "/load": self.load}
        if self.shelf is not None:
            pages |= {"/runs": self.runs, "/run/{name:path}": self.run, "/live/{name:path}": self.live, "/compare": self.compare,
                      "/study/{name:path}": self.study}  # fmt: skip
            app.add_api_route("/do/{what}", self.act, methods=["POST"], response_model=None)
        if self.state is not None:
            pages |= {"/queue": self.queue, "/queue/live": self.queue_live}
        for path, page in pages.items():
            app.add_api_route(path, page, methods=["GET"], response_model=None)
        app.add_api_route("/login", self.sign_in, methods=["POST"], response_model=None)

    @property
    def _shelf(self) -> Shelf:
        assert self.shelf is not None  # the routes are there only with a folder
        return self.shelf

    def _html(self, page: str, status: int = 200, /, **values: Any) -> Response:
        text = self._files.get_template(page).render(**values)
        return HTMLResponse(text, status, {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    def _problem(self, error: Exception, status: int = 400) -> Response:
        return self._html("problem.html", status, said=str(error))

    async def index(self) -> Response:
        """The runs, or the chat where there are none."""
        return RedirectResponse("/runs" if self.shelf is not None else "/chat", 303)

    async def runs(self) -> Response:
        """All runs and studies."""
        found = await asyncio.to_thread(self._shelf.runs)
        return self._html("runs.html", runs=found, studies=self._shelf.studies(), root=self._shelf.root)

    async def run(self, name: str) -> Response:
        """One run: its state and curves, samples and evaluations."""
        try:
            run = self._shelf.run(name)
            live = await self._live_part(name)
            values = {"samples": reading.samples_of(run), "tables": reading.results_of(run)}
        except reading.DAMAGED as error:
            return self._problem(error, 404)
        return self._html("run.html", name=name, live=live, **values)

    async def _live_part(self, name: str) -> str:
        async with self._drawing:
            state = await asyncio.to_thread(reading.state_of_run, self._shelf.run(name))
        return self._files.get_template("live.html").render(name=name, **state)

    async def live(self, request: Request, name: str) -> Response:
        """The live part of a run's page, anew whenever its files change."""
        folder = self._shelf.run(name).path
        return _followed(request, lambda: reading.signature(folder), lambda: self._live_part(name))

    async def queue(self) -> Response:
        """Who trains on the server, and what waits."""
        try:
            return self._html("queue.html", live=await self._tenants())
        except GraftError as error:
            return self._problem(error, 404)

    async def queue_live(self, request: Request) -> Response:
        """The live part of that page, anew whenever something has changed."""
        assert self.state is not None
        state = self.state
        return _followed(request, lambda: queue.signature(state), self._tenants)

    async def _tenants(self) -> str:
        assert self.state is not None
        found = await asyncio.to_thread(queue.read_queue, self.state)
        return self._files.get_template("tenants.html").render(queue=found)

    async def compare(self, request: Request) -> Response:
        """Two runs score by score, or the ranking of several."""
        names = [each for each in request.query_params.getlist("run") if each]
        if len(names) < 2:
            return self._html("compare.html", runs=self._shelf.runs(), names=names, found=None, ranked=None, said=None)
        try:
            sides = [str(self._shelf.run(name).path) for name in names]
            two = await asyncio.to_thread(compare, *sides) if len(sides) == 2 else None
            ranked = await asyncio.to_thread(rank_sides, sides) if two is None else None
            said = None
        except reading.DAMAGED as error:
            two, ranked, said = None, None, str(error)
        return self._html("compare.html", runs=self._shelf.runs(), names=names, found=two, ranked=ranked, said=said)

    async def study(self, name: str) -> Response:
        """The report of a study."""
        try:
            report = self._shelf.report(name)
        except reading.DAMAGED as error:
            return self._problem(error, 404)
        if report is None:
            return self._problem(GraftError(f"{name} has no report yet: graft study writes one while it runs"), 404)
        return HTMLResponse(report, headers={"Content-Security-Policy": POLICY})

    async def chat(self) -> Response:
        """One question to several adapters, side by side."""
        assert self.models is not None  # the route is there only with a server
        return self._html("chat.html", models=[each.name for each in await self.models()])

    async def load(self, request: Request) -> Response:
        """The load of the server, live."""
        engine = request.app.state.engine

        async def events() -> AsyncIterator[dict[str, str]]:
            while not await request.is_disconnected():
                yield {
                    "event": "text",
                    "data": json.dumps(
                        "{running} running, {waiting} waiting, {tokens} tokens so far".format(**engine.load)
                    ),
                }
                await asyncio.sleep(SECONDS)

        return EventSourceResponse(events(), ping=15)

    async def login(self) -> Response:
        """The page to type the token into."""
        return self._html("login.html", said=None)

    async def sign_in(self, request: Request) -> Response:
        """Take the token and give the cookie that stands for it."""
        given = (await _form(request)).get("token", "").strip()
        if self.token is None or not hmac.compare_digest(given.encode(), self.token.encode()):
            await asyncio.sleep(0.5)
            return self._html("login.html", 401, said="This is not the token.")
        response = RedirectResponse("/", 303)
        response.set_cookie(
            COOKIE, session_of(self.token), httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return response

    async def act(self, what: str, request: Request) -> Response:
        """Do something to a run. Only a server with a token does."""
        if self.token is None:
            raise ApiError(
                403, "these pages only show: start them with --token-file to start, stop and submit from them"
            )
        form = await _form(request)
        run, job, text = (form.get(key, "") for key in ("run", "job", "text"))
        does = {
            "start": lambda: actions.start(self._shelf, run, text),
            "resume": lambda: actions.go_on(self._shelf, run),
            "submit": lambda: actions.submit(self._shelf, run, job, text),
            "cancel": lambda: actions.cancel(self._shelf, run, job),
        }
        if what not in does:
            raise ApiError(404, f"there is no action {what[:60]}; there is {', '.join(does)}")
        try:
            said = await does[what]()
        except (GraftError, OSError) as error:
            return self._problem(error)
        return self._html("done.html", said=said, name=run)


def _followed(request: Request, sign: Callable[[], Any], part: Callable[[], Awaitable[str]]) -> Response:
    """Send a part of a page anew whenever its sign changes."""

    async def events() -> AsyncIterator[dict[str, str]]:
        seen = None
        while not await request.is_disconnected():
            if (now := sign()) != seen:
                seen = now
                try:
                    yield {"event": "html", "data": json.dumps(await part())}
                except reading.DAMAGED as error:
                    yield {"event": "problem", "data": json.dumps(str(error))}
            await asyncio.sleep(SECONDS)

    return EventSourceResponse(events(), ping=15)


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form as a browser sends it. Raises `ApiError` for anything else."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise ApiError(415, "a form is sent as application/x-www-form-urlencoded")
    body = await bytes_of(request, MOST_FORM)
    try:
        return {key: values[-1] for key, values in parse_qs(body.decode("utf-8"), max_num_fields=100).items()}
    except ValueError as error:
        raise ApiError(400, "the form cannot be read") from error


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "-"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
