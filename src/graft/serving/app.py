"""The server's application: its routes, its errors, and the engine that lives as long as it does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.errors import GraftError, require
from graft.generation.candidates import Candidate
from graft.generation.loaded import LoadedModel
from graft.generation.running import RunningBatch
from graft.serving.agreement import agreement
from graft.serving.completions import Completions
from graft.serving.engine import Engine
from graft.serving.errors import ApiError, error_response
from graft.serving.guarding import Guard
from graft.serving.pages.queue import read_queue
from graft.serving.pages.reading import Shelf
from graft.serving.pages.site import OPEN_PATHS as PAGES_OPEN
from graft.serving.pages.site import Pages
from graft.serving.served import Served, check_task
from graft.utils.hosts import LOOPBACK
from graft.version import __version__

if TYPE_CHECKING:
    from graft.serving.tinker.training import Training

OPEN_PATHS = ("/health", *PAGES_OPEN)


def make_app(
    loaded: LoadedModel,
    *,
    token: str | None = None,
    hosts: Sequence[str] = LOOPBACK,
    rows: int = 64,
    token_budget: int = 65_536,
    prefixes: int = 32_768,
    most: int = 256,
    runs: Path | None = None,
    state: Path | None = None,
    adapters: Path | None = None,
) -> FastAPI:
    """Return the application. rows, token_budget, prefixes: see `RunningBatch`. most: requests that may be open at once. runs: a folder
    of runs for the pages. state: the folder of a training service; None is no training. adapters: a folder, of which adapter folders
    that come later are served too.

    Raises `GraftError` for a base that writes no text.
    """
    check_task(loaded.base)
    batch = RunningBatch(loaded.base.model, rows=rows, token_budget=token_budget, prefixes=prefixes)
    apart = agreement(loaded)
    engine = Engine(batch, loaded.base.tokenizer, most)
    served = Served(loaded, engine, adapters)
    answering, started = Completions(served, engine), int(time.time())
    training = None if state is None else _training(loaded, engine, state, token)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            async with nullcontext() if training is None else training.running():
                yield
        finally:
            engine.stop()

    app = _application(token, hosts, lifespan)
    app.state.engine, app.state.served = engine, served
    if training is not None:
        app.state.training = training
        training.add_to(app)
    shelf = None if runs is None else Shelf(runs)
    Pages(shelf, token, served.candidates, served.base_label, state).add_to(app)
    app.add_api_route("/v1/chat/completions", answering.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", answering.completions, methods=["POST"], response_model=None)

    def shown(candidate: Candidate) -> dict[str, Any]:
        about = {"base": served.base_label, "kind": served.kind(candidate), "digest": candidate.digest}
        return {"id": candidate.name, "object": "model", "created": started, "owned_by": "graft", **about}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [shown(each) for each in await served.candidates()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return shown(await served.candidate(name))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        state = {"status": "ok" if engine.is_alive() else "stopped", "version": __version__}
        return {**state, "logprobs_apart": apart, "unreadable": served.adapters.unreadable, **engine.load}

    return app


def _training(loaded: LoadedModel, engine: Engine, state: Path, token: str | None) -> Training:
    """Return the training API. Raises `MissingExtra` without protobuf."""
    require("google.protobuf", "serve")
    from graft.serving.tinker.training import Training

    return Training(loaded, engine, state, token)


def make_pages(
    runs: Path, *, token: str | None = None, hosts: Sequence[str] = LOOPBACK, state: Path | None = None
) -> FastAPI:
    """Return the pages of a folder of runs, without a model. state: the folder of a training service whose tenants are shown.

    Raises `GraftError` if there is no such folder.
    """
    if state is not None:
        read_queue(state)
    app = _application(token, hosts, None)
    Pages(Shelf(runs), token, state=state).add_to(app)
    return app


def _application(token: str | None, hosts: Sequence[str], lifespan: Any) -> FastAPI:
    """Return an application with its guard and its errors, and no routes yet."""
    app = FastAPI(
        title="Graft", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.add_middleware(Guard, token=token, hosts=hosts, open_paths=OPEN_PATHS)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(GraftError, _unusable)
    app.add_exception_handler(HTTPException, _not_there)
    app.add_exception_handler(Exception, _failed)
    return app


async def _unusable(_: Request, error: Any) -> Response:
    return error_response(ApiError(400, str(error)))


async def _refused(_: Request, error: Any) -> Response:
    return error_response(error)


async def _not_there(request: Request, error: Any) -> Response:
    said = (
        f"there is no {request.method} {request.url.path[:200]} here"
        if error.status_code in (404, 405)
        else str(error.detail)
    )
    return error_response(ApiError(error.status_code, said))


async def _failed(_: Request, error: Exception) -> Response:  # uvicorn logs it
    return JSONResponse(ApiError(500, "the server failed; its log says how").content, 500)
