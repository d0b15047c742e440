"""What a training service has, as its clients list it: runs, checkpoints, sessions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.serving.errors import ApiError
from graft.serving.guarding import body_of
from graft.serving.tinker.places import FOLDERS, Place, place_of
from graft.serving.tinker.promises import Record
from graft.serving.tinker.service import Service

PAGE = 100
"""Entries of a list where the client names no limit."""
About = Mapping[str, Any]


class Listing:
    """The handlers of the routes that list."""

    def __init__(self, service: Service) -> None:
        self.service, self.books = service, service.books

    def add_to(self, app: Any) -> None:
        """Add the routes to an application."""
        one = "training_runs/{model}/checkpoints/{kind}/{name}"
        for method, path, handler in (
            ("GET", "training_runs", self.runs),
            ("GET", "training_runs/{model}", self.run),
            ("GET", "training_runs/{model}/checkpoints", self.checkpoints_of),
            ("GET", "checkpoints", self.checkpoints),
            ("DELETE", one, self.delete),
            ("PUT", f"{one}/ttl", self.set_ttl),
            ("POST", "weights_info", self.weights_info),
            ("GET", "sessions", self.sessions),
            ("GET", "sessions/{name}", self.session),
        ):
            app.add_route(f"/api/v1/{path}", handler, methods=[method])

    async def runs(self, request: Request) -> Response:
        page, cursor = _page(request, list(self.books.model))
        return JSONResponse({"training_runs": [self._run(name) for name in page], "cursor": cursor})

    async def run(self, request: Request) -> Response:
        return JSONResponse(self._run(self._model(request.path_params["model"])))

    async def checkpoints_of(self, request: Request) -> Response:
        return JSONResponse({"checkpoints": self._of(self._model(request.path_params["model"]))})

    async def checkpoints(self, request: Request) -> Response:
        page, cursor = _page(request, list(self.books.checkpoint))
        return JSONResponse({"checkpoints": [self._checkpoint(path) for path in page], "cursor": cursor})

    async def delete(self, request: Request) -> Response:
        await self.service.remove(self._named(request))
        return JSONResponse({})

    async def set_ttl(self, request: Request) -> Response:
        path, fields = self._named(request), await body_of(request)
        seconds = fields.get("ttl_seconds")
        if seconds is not None and (not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < 1):
            raise ApiError(400, f"ttl_seconds must be null or a whole number above 0; given: {str(seconds)[:60]}")
        expires = None if seconds is None else time.time() + seconds
        await self.service.put(Record("checkpoint", path, {**self.books.checkpoint[path], "expires": expires}))
        return JSONResponse({})

    async def weights_info(self, request: Request) -> Response:
        path = str((await body_of(request)).get("tinker_path"))
        if path not in self.books.checkpoint:
            raise ApiError(404, f"there is no checkpoint {path[:200]!r}")
        about = self.books.model[place_of(path).model]
        rank, sites = about["rank"], str(about["adapter"].get("sites"))
        flags = {"train_unembed": "head", "train_mlp": "mlp.", "train_attn": "attn."}
        found = {"base_model": self.service.effects.bases[0], "is_lora": rank is not None, "lora_rank": rank}
        return JSONResponse(found | ({} if rank is None else {flag: word in sites for flag, word in flags.items()}))

    async def sessions(self, request: Request) -> Response:
        page, _ = _page(request, list(self.books.session))
        return JSONResponse({"sessions": page})

    async def session(self, request: Request) -> Response:
        name = request.path_params["name"]
        about = self.books.session.get(name)
        if about is None:
            raise ApiError(404, f"there is no session {name[:200]!r}")
        models = [each for each, its in self.books.model.items() if its["session"] == name]
        samplers = [each for each, its in self.books.sampler.items() if its["session"] == name]
        own = {"user_metadata": about["labels"], "display_name": about["name"]}
        return JSONResponse({"training_run_ids": models, "sampler_ids": samplers, **own})

    def _model(self, name: str) -> str:
        if name not in self.books.model:
            raise ApiError(404, f"there is no training run {name[:200]!r}")
        return name

    def _named(self, request: Request) -> str:
        named = request.path_params
        path = str(Place(named["model"], named["kind"], named["name"]))
        if path not in self.books.checkpoint:
            raise ApiError(404, f"there is no checkpoint {path[:200]!r}")
        return path

    def _run(self, name: str) -> About:
        about = self.books.model[name]
        paths = self._paths(name)
        last: dict[str, Any] = {each["checkpoint_type"]: each for each in map(self._checkpoint, paths)}
        return {
            "training_run_id": name,
            "base_model": self.service.effects.bases[0],
            "model_owner": "graft",
            "is_lora": about["rank"] is not None,
            "lora_rank": about["rank"],
            "last_request_time": _moment(max([about["made"], *map(self._made, paths)])),
            "last_checkpoint": last.get("training"),
            "last_sampler_checkpoint": last.get("sampler"),
            "user_metadata": about["labels"],
        }

    def _paths(self, model: str) -> list[str]:
        return [path for path in self.books.checkpoint if place_of(path).model == model]

    def _made(self, path: str) -> float:
        return self.books.checkpoint[path]["made"]

    def _of(self, model: str) -> list[About]:
        return [self._checkpoint(path) for path in self._paths(model)]

    def _checkpoint(self, path: str) -> About:
        place, about = place_of(path), self.books.checkpoint[path]
        return {
            "checkpoint_id": place.id,
            "checkpoint_type": FOLDERS[place.kind],
            "time": _moment(about["made"]),
            "tinker_path": path,
            "size_bytes": about["bytes"],
            "public": False,
            "user_metadata": about["labels"],
            "expires_at": None if about["expires"] is None else _moment(about["expires"]),
        }


def _page(request: Request, names: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """Return the newest names first, as many as were asked for, and where that is in the whole list."""
    found = []
    for name, default in (("offset", 0), ("limit", PAGE)):
        text = request.query_params.get(name, str(default))
        if not text.isdecimal() or len(text) > 9:
            raise ApiError(400, f"{name} must be a whole number; given: {text[:60]!r}")
        found.append(int(text))
    offset, limit = found
    page = list(reversed(names))[offset : offset + limit]
    return page, {"offset": offset, "limit": limit, "total_count": len(names)}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
