"""The messages of the package `tinker_public` as classes of protobuf, made from a table.

Numbers and types are the contract; names of messages and fields are not sent. A field is written NAME NUMBER TYPE, where the type may begin
with * (repeated), ? (it is known whether it was sent), ONEOF| (one of several), or # (a map from texts to it).
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClassesForFiles

_PACKAGE = "tinker_public"
_FILE = f"{_PACKAGE}.proto"
_SCALARS = {name: getattr(FieldDescriptorProto, f"TYPE_{name.upper()}") for name in
            ("string", "bytes", "bool", "double", "int32", "int64", "uint32")}  # fmt: skip
_TABLE = {
    "ForwardBackwardRequest": "model_id 1 string, seq_id 2 int32, data 3 *Datum, loss_fn 4 string, loss_fn_config 5 #double, "
    "forward_only 6 bool, loss_fn_config_v2 7 #LossConfigValue",
    "LossConfigValue": "number 1 value|double, text 2 value|string",
    "Datum": "model_input 1 *Chunk, loss_fn_inputs 2 #Tensor, model_input_spans 3 *Span, loss_fn_input_spans 4 *Span",
    "Span": "prompt_tokens 1 span|Piece, sampled_tokens 2 span|Piece",
    "Piece": "sequence_id 1 string, offset 2 int64, length 3 int64",
    "Chunk": "encoded_text 1 chunk|Text, image 2 chunk|Other, dmel 3 chunk|Other",
    "Text": "tokens 1 bytes",
    "Other": "data 1 bytes",
    "Tensor": "dense 1 encoding|bytes, sparse_csr 2 encoding|SparseCsr, dtype 3 int32, shape 4 *int64",
    "SparseCsr": "values 1 bytes, crow_indices 2 bytes, col_indices 3 bytes",
    "ForwardBackwardOutput": "loss_fn_output_type 1 string, loss_fn_outputs 2 *ArrayRecord, metrics 3 #double",
    "ArrayRecord": "type_tag 1 string, fields 2 #BatchedTensor, num_datums 3 int64",
    "BatchedTensor": "data 1 bytes, offsets 2 bytes, dtype 3 int32, trailing_shape 4 *int64",
    "SampleResponse": "sequences 1 *SampledSequence, prompt_logprobs 2 ?bytes, topk_prompt_logprobs 3 ?TopkLogprobs, "
    "prompt_cache_hit_tokens 4 int32, target_prompt_logprobs 5 ?Tensor, prompt_alt_tokens 6 ?PromptDraws",
    "PromptDraws": "tokens 1 Tensor, logprobs 2 Tensor",
    "SampledSequence": "stop_reason 1 int32, tokens 2 bytes, logprobs 3 ?bytes, topk_sampled_logprobs 4 ?TopkLogprobs",
    "TopkLogprobs": "token_ids 1 bytes, logprobs 2 bytes, k 3 uint32, length 4 uint32",
}
"""What Graft reads and writes. An enum travels as an int32. Images are known by their field alone."""


def _set_type(field: FieldDescriptorProto, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


def _add_field(message: DescriptorProto, text: str) -> None:
    name, number, kind = text.split()
    field = message.field.add(name=name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
    group, _, kind = kind.rpartition("|")
    if group:
        known = [each.name for each in message.oneof_decl]
        if group not in known:
            message.oneof_decl.add(name=group)
        field.oneof_index = known.index(group) if group in known else len(known)
    if kind.startswith("?"):
        field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{name}")
    if kind.startswith(("*", "#")):
        field.label = FieldDescriptorProto.LABEL_REPEATED
    if kind.startswith("#"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        for key, (part, inner) in enumerate((("key", "string"), ("value", kind[1:])), start=1):
            _set_type(entry.field.add(name=part, number=key, label=FieldDescriptorProto.LABEL_OPTIONAL), inner)
        kind = f"{message.name}.{entry.name}"
    _set_type(field, kind.lstrip("*?"))


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(name=_FILE, package=_PACKAGE, syntax="proto3")
    for name, fields in _TABLE.items():
        message = file.message_type.add(name=name)
        for text in fields.split(", "):
            _add_field(message, text)
    pool = DescriptorPool()
    pool.Add(file)  # a pool of our own, so that a client in the same process keeps its own
    return {name.rpartition(".")[2]: each for name, each in GetMessageClassesForFiles([_FILE], pool).items()}


MESSAGES: dict[str, Any] = _classes()
"""Message classes by name."""
ForwardBackwardRequest = MESSAGES["ForwardBackwardRequest"]
ForwardBackwardOutput = MESSAGES["ForwardBackwardOutput"]
SampleResponse = MESSAGES["SampleResponse"]
