"""The model of a run that trained its base: what evaluates, answers and chats in place of an adapter."""

from __future__ import annotations

from graft.config.base import BaseConfig
from graft.config.run import RunConfig
from graft.errors import GraftError
from graft.runs.folder import RunFolder


def trained_base(folder: RunFolder, config: RunConfig, given: BaseConfig | None) -> BaseConfig | None:
    """Return the base that a run trained, to be loaded; None for a run that trained adapters.

    config: the run's job. given: the base with the changes of the caller. Raises `GraftError` if there is no model yet, and for
    another base, which has nothing to do with the run.
    """
    method = config.train.method
    if method.parts is None:
        return None
    if given is not None and given.model != config.base.model:
        raise GraftError(
            f"the run in {folder.path} trained its base (train.method {method.kind}), so another base has nothing of it: leave out --base"
        )
    found = folder.trained_model
    if found is None:
        state = folder.read_status().get("state", "not started")
        raise GraftError(f"the run in {folder.path} has no model yet (it is {state}): graft resume {folder.path}")
    settings = {"model": str(found), "tokenizer": None, "new_tokens": (), "head": "auto", "revision": None}
    return (given or config.base).model_copy(update=settings)


def without_adapter(folder: RunFolder) -> GraftError:
    """Return the error for a run that has no adapter: it trained a whole model, or has not come so far."""
    if folder.trained_model is not None:
        return GraftError(
            f"the run in {folder.path} trained a whole model and no adapter: name it as a base, --base {folder.trained_model}"
        )
    state = folder.read_status().get("state", "not started")
    return GraftError(f"the run in {folder.path} has no adapter yet (it is {state}): graft resume {folder.path}")
