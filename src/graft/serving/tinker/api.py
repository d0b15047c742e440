"""The routes of the training API, as clients of the Tinker API expect them: from a request to a promise, and from a promise to a result.

What can be placed (a model and its sequence number are legible) always gets a promise, which fails if the rest is wrong: a client counts
the number as used either way, and what comes after would wait for ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.bases.context import context_length
from graft.errors import GraftError
from graft.serving.errors import ApiError
from graft.serving.guarding import body_of, bytes_of
from graft.serving.tinker import refusing
from graft.serving.tinker.asking import canonical, read_request
from graft.serving.tinker.bodies import SamplerBody, SessionBody, read
from graft.serving.tinker.drawing import Drawing
from graft.serving.tinker.futures import Futures
from graft.serving.tinker.listing import Listing
from graft.serving.tinker.places import model_id, place_of, sampler_id
from graft.serving.tinker.promises import OtherContent, Promise, Record, number_of
from graft.serving.tinker.service import Service
from graft.serving.tinker.sessions import Sessions

CONFIG = {
    # what makes older releases of the client speak this protocol too
    "proto_write_fwdbwd": True,
    "fwd_via_fwdbwd": True,
    "create_model_via_load_weights": True,
    # no larger than what may stand in front of another client's request
    "fwdbwd_max_chunk_len": 256,
    "fwdbwd_max_chunk_bytes_count": 1_000_000,
    "sample_use_retrieve_futures": True,
    "sample_join_sampling_session": True,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}
PROTOBUF = "application/x-protobuf"
MOST_SAMPLES = 1024
MOST_BYTES = 64 * 1024 * 1024
"""Most bytes of a forward_backward request. Clients cut calls into smaller ones, but not a single datum."""
ORDERED = ("optim_step", "save_weights", "save_weights_for_sampler")
REFUSED = {
    "save_weights_external": "use save_weights, and graft export on the checkpoint's folder",
    "create_custom_loss": "give forward_backward_custom a function that runs in the client",
    "copy_weights": "load the checkpoint and save it under another name",
}
Fields = Mapping[str, Any]


class Api:
    """The handlers of the routes under /api/v1."""

    def __init__(self, service: Service, sessions: Sessions, drawing: Drawing, listing: Listing) -> None:
        self.service, self.sessions, self.drawing, self.listing = service, sessions, drawing, listing
        self.base, self.futures = drawing.base, Futures(service, drawing)

    def add_to(self, app: Any) -> None:
        """Add the routes to an application."""
        posts = {
            "client/config": self.config,
            "client/dynamic_config": self.dynamic_config,
            "telemetry": self.telemetry,
            "create_session": self.create_session,
            "session_heartbeat": self.heartbeat,
            "sessions/{name}/finish": self.finish,
            "create_model": self.create_model,
            "get_info": self.get_info,
            "forward_backward": self.forward_backward,
            "load_weights": self.load_weights,
            "create_sampling_session": self.create_sampling_session,
            "asample": self.asample,
            "retrieve_future": self.retrieve_future,
            **{kind: self._ordered(kind) for kind in ORDERED},
            **{kind: self._refused(kind, advice) for kind, advice in REFUSED.items()},
        }
        gets = {
            "healthz": self.healthz,
            "get_server_capabilities": self.capabilities,
            "samplers/{name}": self.sampler,
        }
        for path, handler in posts.items():
            app.add_route(f"/api/v1/{path}", handler, methods=["POST"])
        for path, handler in gets.items():
            app.add_route(f"/api/v1/{path}", handler, methods=["GET"])
        for each in (self.listing, self.futures, refusing):
            each.add_to(app)

    async def config(self, _: Request) -> Response:
        return JSONResponse(CONFIG)

    async def dynamic_config(self, _: Request) -> Response:
        return JSONResponse(DYNAMIC_CONFIG)

    async def telemetry(self, _: Request) -> Response:
        """It may hold tracebacks and keys, so it is not even read."""
        return JSONResponse({"status": "accepted"})

    async def healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def capabilities(self, _: Request) -> Response:
        length = context_length(self.base.model)
        about = {"max_context_length": length, "trainable": True, "sampleable": True}
        return JSONResponse(
            {"supported_models": [{"model_name": each, **about} for each in self.service.effects.bases]}
        )

    async def create_session(self, request: Request) -> Response:
        name = await self.sessions.begin(read(SessionBody, await body_of(request)))
        return JSONResponse({"session_id": name, "type": "create_session"})

    async def heartbeat(self, request: Request) -> Response:
        try:
            self.sessions.seen(self.sessions.open((await body_of(request)).get("session_id")))
        except GraftError as error:
            raise ApiError(410, str(error)) from error
        return JSONResponse({"type": "session_heartbeat"})

    async def finish(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.service.books.session:
            raise ApiError(404, f"there is no session {name[:200]!r}")
        await self.sessions.finish(name)
        return JSONResponse({"type": "session_finish"})

    async def create_model(self, request: Request) -> Response:
        fields = await body_of(request)
        session, number = self.sessions.open(fields.get("session_id")), _number(fields, "model_seq_id")
        return await self._made("create_model", model_id(session, number), 0, fields)

    async def load_weights(self, request: Request) -> Response:
        fields = await body_of(request)
        if fields.get("session_id") is None:
            return await self._placed("load_weights", fields)
        session, number = self.sessions.open(fields["session_id"]), _number(fields, "model_seq_id")
        return await self._made("load_weights", model_id(session, number), 0, fields)

    def _ordered(self, kind: str) -> Any:
        async def handler(request: Request) -> Response:
            return await self._placed(kind, await body_of(request))

        return handler

    def _refused(self, kind: str, advice: str) -> Any:
        async def handler(request: Request) -> Response:
            fields = await body_of(request)
            if "model_id" in fields and "seq_id" in fields:
                return await self._placed(f"refused:{kind} is not supported here: {advice}", fields)
            raise ApiError(400, f"{kind} is not supported here: {advice}")

        return handler

    async def _placed(self, kind: str, fields: Fields) -> Response:
        """Promise what has its place in the sequence of a model."""
        model, seq = self._place(fields.get("model_id"), fields)
        return await self._made(kind, model, seq, fields)

    async def _made(self, kind: str, model: str, seq: int, fields: Fields) -> Response:
        content = json.dumps(fields, sort_keys=True).encode()
        return _promised(await self._promise(kind, ("model", model, seq), model, seq, content, content))

    async def forward_backward(self, request: Request) -> Response:
        if (kind := request.headers.get("content-type", "").partition(";")[0].strip().lower()) != PROTOBUF:
            raise ApiError(415, f"the body must be {PROTOBUF}; given: {kind[:60] or 'nothing'}")
        body = await bytes_of(request, MOST_BYTES)
        try:
            message = read_request(body)
        except GraftError as error:
            raise ApiError(
                400, f"{error}; its sequence number is not legible, so what follows it cannot run"
            ) from error
        model, seq = self._place(message.model_id, {"seq_id": message.seq_id})
        key = ("model", model, seq)
        return _promised(await self._promise("forward_backward", key, model, seq, body, canonical(message)))

    async def asample(self, request: Request) -> Response:
        fields = await body_of(request)
        sampler, seq = str(fields.get("sampling_session_id")), _number(fields, "seq_id", most=2**63 - 1)
        if sampler not in self.service.books.sampler:
            raise ApiError(404, f"there is no sampler {sampler[:200]!r}, or its session is over")
        if self.drawing.full(sampler):
            raise ApiError(429, "as many samples of this session wait as this server takes")
        count = _number(fields, "num_samples", 1, MOST_SAMPLES, default=1)
        content = json.dumps(fields, sort_keys=True).encode()
        promise, new = await self._promise("sample", ("sampler", sampler, seq), sampler, seq, content, content)
        if new:
            self.drawing.start(promise)
        ids = [f"{promise.name}-{index}" for index in range(count)]
        return JSONResponse({"request_id": promise.name, "sample_sequence_ids": ids})

    async def _promise(
        self, kind: str, key: tuple[Any, ...], owner: str, seq: int, content: bytes, canonical: bytes
    ) -> tuple[Promise, bool]:
        try:
            return await self.service.promise(kind, key, owner, seq, content, canonical)
        except OtherContent as error:
            raise ApiError(422, str(error)) from error

    def _place(self, model: Any, fields: Fields) -> tuple[str, int]:
        """Return a model and the number of a request to it."""
        if not isinstance(model, str) or model not in self.service.order:
            raise ApiError(404, f"there is no model {str(model)[:200]!r}, or its session is over")
        seq = _number(fields, "seq_id", 1)
        if self.service.order.full(model, seq):
            raise ApiError(429, "as many requests of this model wait as this server takes")
        return model, seq

    async def retrieve_future(self, request: Request) -> Response:
        name = str((await body_of(request)).get("request_id"))
        try:
            result = await self.service.result(number := number_of(name))
        except KeyError as error:
            raise ApiError(404, f"there is no request {name[:200]!r}") from error
        if result is None:
            return JSONResponse({"type": "try_again", "request_id": name, **self.service.state(number)})
        return Response(result.body, media_type=PROTOBUF if result.form == "protobuf" else "application/json")

    async def get_info(self, request: Request) -> Response:
        model = str((await body_of(request)).get("model_id"))
        about = self.service.books.model.get(model)
        if about is None:
            raise ApiError(404, f"there is no model {model[:200]!r}")
        name, rank = self.service.effects.bases[0], about["rank"]
        data = {"arch": type(self.base.model).__name__, "model_name": name, "tokenizer_id": self._tokenizer}
        return JSONResponse(
            {"model_data": data, "model_id": model, "model_name": name, "is_lora": rank is not None, "lora_rank": rank}
        )

    @property
    def _tokenizer(self) -> str:
        return str(getattr(self.base.tokenizer, "name_or_path", "") or self.base.name)

    async def create_sampling_session(self, request: Request) -> Response:
        fields = await body_of(request)
        body = read(SamplerBody, fields)
        name = sampler_id(self.sessions.open(body.session_id), body.sampling_session_seq_id)
        asked = {"base_model": body.base_model, "model_path": body.model_path}
        known = self.service.books.sampler.get(name)
        if known is None:
            about = {"session": body.session_id, "asked": asked}
            if body.model_path is not None:
                place = place_of(body.model_path)
                await self.service.copy(place, name)
                about |= {"folder": name, "path": body.model_path, "model": place.model}
            else:
                self.service.effects.check_base(str(body.base_model))
            await self.service.put(Record("sampler", name, about))
        elif known.get("asked") != asked:
            raise ApiError(422, f"sampler {name} was made from something else")
        return JSONResponse({"sampling_session_id": name, "type": "create_sampling_session"})

    async def sampler(self, request: Request) -> Response:
        name = request.path_params["name"]
        about = self.service.books.sampler.get(name)
        if about is None:
            raise ApiError(404, f"there is no sampler {name[:200]!r}")
        path = {"model_path": about["path"]} if "path" in about else {}
        return JSONResponse({"sampler_id": name, "base_model": self.service.effects.bases[0], **path})


def _promised(made: tuple[Promise, bool]) -> Response:
    promise, _ = made
    return JSONResponse({"request_id": promise.name, "model_id": promise.owner})


def _number(fields: Fields, name: str, least: int = 0, most: int = 2**31 - 1, default: int | None = None) -> int:
    """Return a whole number of a body. Raises `ApiError`."""
    given = fields.get(name, default)
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
        raise ApiError(400, f"{name} must be a whole number from {least} to {most}; given: {str(given)[:60]}")
    return given
