"""Load a base for a task: from a folder, from the hub, or "seedling", the small base that comes with Graft.

Nothing is guessed in silence: a missing folder, a hub that does not answer, a missing GPU, and a model without its tokenizer are errors
that say so. Code from a repository runs only if the user allows it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from graft.attaching.fingerprint import fingerprint, keep_digest
from graft.bases.heads import draw_head, fresh_modules, head_modules
from graft.bases.quantised import quantised as is_quantised
from graft.bases.quantising import method_of, need_bitsandbytes, options_of, refuse_unknown_method, settle
from graft.bases.sources import SEEDLING as SEEDLING
from graft.bases.sources import explained, near, source_of
from graft.bases.stored import narrower, refuse_no_gain
from graft.bases.streams import with_coupling
from graft.bases.vocabulary import add_tokens, fit_tables
from graft.config.base import BaseConfig
from graft.distributed.sharded import stream
from graft.errors import GraftError, counted
from graft.utils import launched
from graft.utils.allocator import large_blocks_given_back

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
LABELLED = ("classification", "regression")
"""Tasks for which the model has a head over labels."""
CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    **dict.fromkeys(LABELLED, AutoModelForSequenceClassification),
}
"""The class of transformers that loads a base for a task."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A model in evaluation mode on its device, and its tokenizer. Nothing in the model requires gradients."""

    model: Any
    tokenizer: Any
    name: str
    """The folder or hub name, as the user wrote it."""
    device: torch.device
    dtype: torch.dtype
    task: str = "causal"
    fresh: tuple[str, ...] = ()
    """Layers of the head that the model's files lack: their weights are random, and the adapter learns them."""
    added: tuple[int, ...] = ()
    """Ids of tokens that the run added: the base never learnt their rows, and the adapter trains them."""

    @property
    def identity(self) -> dict[str, Any]:
        """The model's name, shape and weight digest, as a saved adapter records them (`graft.attaching.fingerprint`)."""
        return fingerprint(self.model, self.model.__dict__.get("graft_state"))


def load_base(config: BaseConfig | str, task: str = "causal", classes: Sequence[str] = (), whole: bool = True) -> Base:
    """Load the base that a config, or just a name, describes, with the head that the task needs.

    task: causal, seq2seq, classification or regression. classes: the names of the classes in order, for classification. whole: False
    leaves the base on the host, mapped from its files where it can be, for the caller to cut into parts.
    Raises `GraftError` for a folder or hub name that cannot be read, an unknown device, a missing tokenizer, and a head with another
    number of classes.
    """
    config = BaseConfig(model=config) if isinstance(config, str) else config
    tokenizer = load_tokenizer(config)
    device = check_device(config.device)
    dtype = dtype_of(config.dtype, device)
    if config.offload is not None and task != "causal":
        raise GraftError(f"base.offload is for causal models, and data.task makes this one of {task}: remove it")
    model, fresh = _loaded(config, task, classes, whole)
    if task in LABELLED:
        padding = pad_id(tokenizer, model)  # a decoder finds the last token of a row by the padding id
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = padding
    added = fit_tables(model, tokenizer, config)
    if config.offload is not None:
        keep_digest(model)
        stream(model, device, dtype)
    if config.offload is None and whole:
        device, dtype = model.device, model.dtype
    return Base(model, tokenizer, config.model, device, dtype, task, fresh, added)


def load_model(config: BaseConfig, task: str = "causal", classes: Sequence[str] = ()) -> Any:
    """Load the model without its tokenizer: frozen, in evaluation mode, on its device."""
    return _loaded(config.model_copy(update={"offload": None}), task, classes)[0]


def own_classes(config: BaseConfig) -> tuple[str, ...] | None:
    """Return the classes of the base's own head, in order. None if it has no such head, or the config asks for a fresh one."""
    if config.head == "fresh":
        return None
    source, options = source_of(config)
    with explained(config, source):
        found: Any = AutoConfig.from_pretrained(source, **options)
    return tuple(found.id2label[number] for number in range(found.num_labels)) if _has_head(found) else None


def own_task(config: BaseConfig) -> str:
    """Return the task of the base's own head: causal, seq2seq, classification or regression."""
    source, options = source_of(config)
    with explained(config, source):
        found = AutoConfig.from_pretrained(source, **options)
    if _has_head(found):
        return "regression" if found.problem_type == "regression" else "classification"
    return "seq2seq" if found.is_encoder_decoder else "causal"


def pad_id(tokenizer: Any, model: Any = None) -> int:
    """Return the id to pad with: the model's own, which encoders that count positions by ids need, or else the tokenizer's, or else 0."""
    own = None if model is None else getattr(model.config.get_text_config(), "pad_token_id", None)
    return next((each for each in (own, tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


def _has_head(found: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in found.architectures or ())


def _loaded(config: BaseConfig, task: str, classes: Sequence[str], whole: bool = True) -> tuple[Any, tuple[str, ...]]:
    """Load the model. Return it and the paths of the head's layers that were drawn at random."""
    device = check_device(config.device)
    dtype = dtype_of(config.dtype, device)
    source, options = source_of(config)
    drawn = config.head == "fresh"
    if drawn and task not in LABELLED:
        raise GraftError(f"base.head: fresh is for data.task {' and '.join(LABELLED)}; this run has {task}")
    with explained(config, source):
        found = AutoConfig.from_pretrained(source, **options)
        if config.attention != "auto":
            options["attn_implementation"] = config.attention
        if task in LABELLED:
            _set_labels(found, config, task, classes)
        quantised = config.quantize is not None or method_of(found) is not None
        if config.offload is not None or not whole:
            held = (None if quantised else narrower(source, options, dtype)) or dtype
            if config.offload is not None and device.type == "cpu":
                refuse_no_gain(source, quantised, held, dtype)
            device, dtype = torch.device("cpu"), held
        if quantised:
            options |= _quantised(config, found, task, device, dtype)
        on_host = large_blocks_given_back() if config.quantize is not None and device.type == "cpu" else nullcontext()
        with _without_missing_table(task), on_host:
            loaded: Any = CLASSES[task].from_pretrained(
                source, config=found, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=drawn, **options
            )
        model, info = loaded
    # A head with another number of classes counts as missing: transformers has replaced it, as `ignore_mismatched_sizes` allows.
    others = sorted(each if isinstance(each, str) else each[0] for each in info["mismatched_keys"])
    missing, fresh = sorted({*info["missing_keys"], *others}), ()
    if quantised:
        settle(model, dtype, {name.rpartition(".")[0] for name in missing})
        own = method_of(found)
        if config.quantize is None and own is not None and not is_quantised(model):
            warnings.warn(
                f"base.model: the weights in {source} are quantised ({own.get('quant_method')}), and transformers dequantised them to "
                f"{str(dtype).removeprefix('torch.')} because this device cannot compute with them",
                stacklevel=2,
            )
    if task in LABELLED and (missing or drawn):
        fresh, missing = fresh_modules(model, missing), []
        fresh = tuple(dict.fromkeys((*fresh, *head_modules(model)))) if drawn else fresh
        draw_head(model, fresh, seed=0)
    if missing:
        # transformers has filled these with random numbers
        raise GraftError(
            f"base.model: the weights in {source} lack {len(missing)} tensors of {type(model).__name__}, for example "
            f"'{missing[0]}'"
        )
    model = model.requires_grad_(False).eval()
    return with_coupling(model if quantised else model.to(device), config), fresh


def _quantised(config: BaseConfig, found: Any, task: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options to load a base that is quantised while it loads, or comes quantised."""
    place = {"device_map": {"": device}}
    if config.quantize is None:
        refuse_unknown_method(config, own := method_of(found) or {})
        if own.get("quant_method") == "bitsandbytes":
            need_bitsandbytes()
        return place
    with torch.device("meta"):
        empty = CLASSES[task].from_config(found)
    return {**place, **options_of(config, found, empty, dtype, task in LABELLED)}


def load_as_saved(config: BaseConfig) -> Any:
    """Load the model as the class that its config names, frozen and in evaluation mode, to read and write adapter folders with."""
    device, (source, options) = check_device(config.device), source_of(config)
    with explained(config, source):
        found = AutoConfig.from_pretrained(source, **options)
        cls = getattr(transformers, (found.architectures or ["-"])[0], AutoModelForCausalLM)
        model: Any = cls.from_pretrained(source, config=found, dtype=dtype_of(config.dtype, device), **options)
    return model.requires_grad_(False).eval().to(device)


def _set_labels(found: Any, config: BaseConfig, task: str, classes: Sequence[str]) -> None:
    """Set the labels in a model's config. Raises `GraftError` if the base's own head has another number of them."""
    count = len(classes) if task == "classification" else 1
    if _has_head(found) and found.num_labels != count and config.head == "auto":
        raise GraftError(
            f"base.model '{config.model}' has a head for {found.num_labels} labels ({', '.join(found.id2label.values())}), but the data "
            f"have {count}: base.head: fresh draws a new one"
        )
    found.id2label = dict(enumerate(classes)) if task == "classification" else {0: "LABEL_0"}
    found.label2id = {name: number for number, name in found.id2label.items()}
    found.problem_type = "regression" if task == "regression" else "single_label_classification"


@contextmanager
def _without_missing_table(task: str) -> Iterator[None]:
    """Silence transformers' table of missing tensors for a head, which the run reports in one line. Also restore the random state."""
    level = logging.get_verbosity()
    if task in LABELLED:
        logging.set_verbosity_error()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        logging.set_verbosity(level)


def load_tokenizer(config: BaseConfig) -> Any:
    """Load the tokenizer without its model, with the tokens that the config adds. Raises `GraftError` if there is none."""
    source, options = _tokenizer_source(config)
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in TOKENIZER_FILES):
        # transformers would build an empty tokenizer of the model's type, which turns every text into no tokens at all
        raise GraftError(f"{source} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")
    with explained(config, source):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    add_tokens(tokenizer, config)
    return tokenizer


def _tokenizer_source(config: BaseConfig) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub name of the tokenizer, which may lie in a folder without a model, and the options to load it with."""
    if config.tokenizer is None:
        return source_of(config)
    path = Path(config.tokenizer).expanduser()
    if path.is_dir():
        return str(path), {"trust_remote_code": config.trust_remote_code}
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.tokenizer):
        raise GraftError(f"base.tokenizer: there is no folder {path}.{near(path)}")
    return config.tokenizer, {"trust_remote_code": config.trust_remote_code}


def check_device(name: str) -> torch.device:
    """Return the device with this name; auto is the GPU of this process (the first, without a launcher), or else the CPU.

    Raises `GraftError` if this machine has no such device, or fewer GPUs than processes.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        if 0 < count <= launched.local_rank():
            raise GraftError(
                f"base.device: this machine has {counted(count, 'GPU')} for more processes: start fewer, or set cpu"
            )
        return torch.device(f"cuda:{launched.local_rank()}" if count else "cpu")
    if name == "cpu" or (name == "mps" and mps):
        return torch.device(name)
    number = re.fullmatch(r"cuda(?::(\d+))?", name)
    if number and int(number[1] or 0) < count:
        return torch.device("cuda", int(number[1] or 0))
    there = ["cpu", *(f"cuda:{index}" for index in range(count)), *(["mps"] if mps else [])]
    raise GraftError(f"base.device: this machine has no device '{name}'; it has {', '.join(there)} (or use auto)")


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the number format that `base.dtype` means on a device."""
    if name != "auto":
        return _DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
