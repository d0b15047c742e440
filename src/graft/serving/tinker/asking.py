"""A forward_backward request as an `Ask` of the session, and what the session gives as its answer."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from graft.errors import GraftError
from graft.serving.tinker.messages import ForwardBackwardOutput, ForwardBackwardRequest
from graft.serving.tinker.tensors import add_records, tensor_of, tokens_of
from graft.training.session import Ask, Given, TokenSample

ADVICE = {"stable_reinforce": "its formula is not published"}


def read_request(body: bytes) -> Any:
    """Return the message. Raises `GraftError` for bytes that are none."""
    try:
        return ForwardBackwardRequest.FromString(body)
    except DecodeError as error:
        raise GraftError("the body is not a forward_backward request in protobuf") from error


def canonical(request: Any) -> bytes:
    """Return bytes that are equal for requests of equal content: maps serialise in any order."""
    return request.SerializeToString(deterministic=True)


def ask_of(request: Any, tenant: str) -> Ask:
    """Return what a request asks of the session. Raises `GraftError` for what Graft does not support."""
    if request.loss_fn in ADVICE:
        raise GraftError(f"the loss {request.loss_fn} is not supported here: {ADVICE[request.loss_fn]}")
    if not request.data:
        raise GraftError("the request holds no data")
    samples = [_sample(number, datum) for number, datum in enumerate(request.data)]
    return Ask(tenant, samples, request.loss_fn, _settings(request))


def _settings(request: Any) -> dict[str, float]:
    """Numbers stand in both maps; a text stands in the second alone, and no loss of ours takes one."""
    found = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise GraftError(f"loss_fn_config: {name} must be a number; given: {value.text[:60]!r}")
        found[name] = value.number
    return found


def _sample(number: int, datum: Any) -> TokenSample:
    where = f"datum {number}"
    ids: list[int] = []
    for chunk in datum.model_input:
        if (kind := chunk.WhichOneof("chunk")) != "encoded_text":
            raise GraftError(
                f"{where}: the model input holds a chunk of {kind or 'no type'}; only tokens are supported"
            )
        ids += tokens_of(chunk.encoded_text.tokens, f"{where}: the model input")
    if not ids:
        raise GraftError(f"{where}: the model input holds no tokens")
    fields = {name: tensor_of(tensor, f"{where}: {name}") for name, tensor in datum.loss_fn_inputs.items()}
    return TokenSample(ids, fields)


def answer_of(given: Given) -> bytes:
    """Return the answer: the log-probabilities of all targets, and the sum of the losses."""
    output = ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    add_records(output, "logprobs", given.logprobs)
    output.metrics["loss:sum"] = given.loss
    return output.SerializeToString()
