"""What promises do to the models in training: the engine thread's side of the service.

The same promises in the same ticks have the same effects, so a service that was killed runs the ticks after its last snapshot again.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graft.adapters.base import AdapterConfig
from graft.adapters.parsing import parse
from graft.errors import GraftError
from graft.formats.own import read_header
from graft.serving.tinker.asking import answer_of, ask_of, read_request
from graft.serving.tinker.bodies import LoadBody, ModelBody, SamplerSaveBody, SaveBody, StepBody, read
from graft.serving.tinker.kinds import adapter_of
from graft.serving.tinker.places import Place, Places, adapter_name, place_of, sampler_id, session_of
from graft.serving.tinker.promises import Promise, Record, Result
from graft.training.session import Ask, Given, Session
from graft.training.tenant import AdamSettings

Outcome = tuple[Result, list[Record]]
SAVES = ("save_weights", "save_weights_for_sampler")


class Effects:
    """Carries out promises on a session. It belongs to the engine thread."""

    def __init__(self, session: Session, places: Places, bases: Sequence[str]) -> None:
        """bases: the names that clients may call the base by; the first is the one that answers give."""
        self.session, self.places, self.bases = session, places, tuple(bases)
        self.checkpoints: set[str] = set()
        """The addresses that are taken."""
        self._single: dict[str, Callable[[Promise], Outcome]] = {
            "create_model": self._create,
            "optim_step": self._step,
            "save_weights": self._save,
            "save_weights_for_sampler": self._save_for_sampler,
            "load_weights": self._load,
            "close": self._close,
        }

    def run(self, promises: Sequence[Promise]) -> dict[int, Outcome]:
        """Carry out the promises of one tick, at most one per model. Those that compute gradients share passes, and so do the others."""
        found: dict[int, Outcome] = {}
        learning: list[tuple[Promise, Ask]] = []
        scoring: list[tuple[Promise, Ask]] = []
        for promise in promises:
            kind, _, reason = promise.kind.partition(":")
            if kind == "refused":
                found[promise.id] = Result.failed(reason), []
                continue
            if kind != "forward_backward":
                found[promise.id] = self._guarded(promise, lambda promise=promise: self._single[promise.kind](promise))
                continue
            try:
                request = read_request(promise.content)
                asked = promise, ask_of(request, self._tenant(promise.owner))
                (scoring if request.forward_only else learning).append(asked)
            except GraftError as error:
                found[promise.id] = Result.failed(str(error)), []
        for asked, pass_over in ((scoring, self.session.forward), (learning, self.session.gradients)):
            if asked:
                given = pass_over([ask for _, ask in asked])
                found |= {each.id: _answer(one) for (each, _), one in zip(asked, given, strict=True)}
        return found

    def _guarded(self, promise: Promise, work: Callable[[], Outcome]) -> Outcome:
        try:
            return work()
        except GraftError as error:
            return Result.failed(str(error)), []
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return Result.failed(f"{promise.kind} failed; the server's log says how", "server"), []

    def _tenant(self, model: str) -> str:
        name = adapter_name(model)
        if name not in self.session.tenants:
            raise GraftError(f"there is no model {model}: it was not made, or its session is over")
        return name

    def _create(self, promise: Promise) -> Outcome:
        body = read(ModelBody, json.loads(promise.content))
        self.check_base(body.base_model)
        config = adapter_of(body.lora_config, body.user_metadata, self.session.model)
        self.session.open(adapter_name(promise.owner), config, body.lora_config.seed or 0)
        record = self._model(promise.owner, body.session_id, config, body.lora_config.seed or 0, body.user_metadata)
        return Result.json({"model_id": promise.owner, "type": "create_model"}), [record]

    def check_base(self, name: str) -> None:
        """Raise `GraftError` for a base that is not served."""
        if name not in self.bases:
            raise GraftError(f"this server trains on {' or '.join(self.bases)}; given: {name[:200]!r}")

    def _model(self, name: str, session: str, config: AdapterConfig, seed: int, labels: Any) -> Record:
        lora = config if config.kind == "lora" else None
        about = {
            "session": session,
            "adapter": config.model_dump(mode="json"),
            "seed": seed,
            "rank": getattr(lora, "rank", None),
            "labels": texts_of(labels),
            "made": time.time(),
        }
        return Record("model", name, about)

    def _step(self, promise: Promise) -> Outcome:
        params = read(StepBody, json.loads(promise.content)).params
        settings = AdamSettings(**params.model_dump(exclude={"type"}))
        metrics = self.session.update(self._tenant(promise.owner), settings)
        return Result.json({"metrics": metrics}), []

    def _save(self, promise: Promise) -> Outcome:
        body = read(SaveBody, json.loads(promise.content))
        place = Place(promise.owner, "weights", body.path)
        record = self._checkpoint(place, body, body.overwrite)
        return Result.json({"path": str(place), "type": "save_weights"}), [record]

    def _save_for_sampler(self, promise: Promise) -> Outcome:
        body = read(SamplerSaveBody, json.loads(promise.content))
        if body.path is not None:
            place = Place(promise.owner, "sampler_weights", body.path)
            record = self._checkpoint(place, body, overwrite=False)
            return Result.json({"path": str(place), "type": "save_weights_for_sampler"}), [record]
        session, number = session_of(promise.owner), body.sampling_session_seq_id
        sampler = f"{promise.owner}:snapshot:{promise.seq}" if number is None else sampler_id(session, number)
        self.session.save(self._tenant(promise.owner), self.places.sampler(sampler), optimizer=False)
        about = {"session": session, "model": promise.owner, "folder": sampler, "inflight": body.kind == "inflight"}
        result = Result.json({"sampling_session_id": sampler, "type": "save_weights_for_sampler"})
        return result, [Record("sampler", sampler, about)]

    def _checkpoint(self, place: Place, body: SaveBody | SamplerSaveBody, overwrite: bool) -> Record:
        folder, tenant = self.places.checkpoint(place), self._tenant(place.model)
        if str(place) in self.checkpoints and not overwrite:
            raise GraftError(f"{place} is there already: save under another name, or with overwrite")
        self.session.save(tenant, folder)
        self.checkpoints.add(str(place))
        now = time.time()
        about = {
            "made": now,
            "expires": None if body.ttl_seconds is None else now + body.ttl_seconds,
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "labels": texts_of(body.user_metadata),
        }
        return Record("checkpoint", str(place), about)

    def _load(self, promise: Promise) -> Outcome:
        body = read(LoadBody, json.loads(promise.content))
        place = place_of(body.path)
        folder = self.places.checkpoint(place)
        if str(place) not in self.checkpoints:
            raise GraftError(f"there is no checkpoint {place}")
        records, name = [], adapter_name(promise.owner)
        if body.session_id is not None:
            if body.base_model is not None:
                self.check_base(body.base_model)
            config: Any = parse(read_header(folder)["adapter"])
            self.session.open(name, config)
            records = [self._model(promise.owner, body.session_id, config, 0, body.user_metadata)]
        try:
            self.session.load(self._tenant(promise.owner), folder, body.optimizer)
        except GraftError:
            if records:
                self.session.close(name)
            raise
        return Result.json({"path": body.path, "model_id": promise.owner, "type": "load_weights"}), records

    def _close(self, promise: Promise) -> Outcome:
        self.session.close(self._tenant(promise.owner))
        return Result.json({}), [Record("model", promise.owner, {**json.loads(promise.content), "closed": True})]

    def again(self, promises: Sequence[tuple[Promise, bool]]) -> dict[int, Outcome]:
        """Run a tick again after a crash. What it saved with a result is there already."""
        return self.run([promise for promise, done in promises if not (done and promise.kind in SAVES)])


def _answer(given: Given | GraftError) -> Outcome:
    if isinstance(given, GraftError):
        return Result.failed(str(given)), []
    return Result("protobuf", answer_of(given)), []


def texts_of(labels: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Return a client's labels as listings have them: texts."""
    return (
        None
        if labels is None
        else {key: each if isinstance(each, str) else json.dumps(each) for key, each in labels.items()}
    )
