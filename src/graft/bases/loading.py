"""Loading a base for a task: a folder, a name on the hub, or "seedling", the small base that Graft brings.

Nothing is guessed in silence: a folder that is missing, a hub that does not answer, a GPU that is not there, and a model
without its tokenizer are errors that say so. Code that a repository brings along runs only if the user allows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from graft.attaching.fingerprint import fingerprint
from graft.bases.heads import draw_head, fresh_modules, head_modules
from graft.config.base import BaseConfig
from graft.errors import GraftError, MissingExtra, nearest

SEEDLING = "seedling"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
LABELLED = ("classification", "regression")
"""Tasks whose model has a head over labels."""
_CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    **dict.fromkeys(LABELLED, AutoModelForSequenceClassification),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A model with its tokenizer, in evaluation mode, on its device. Nothing in it requires gradients."""

    model: Any
    tokenizer: Any
    name: str
    """As the user wrote it."""
    device: torch.device
    dtype: torch.dtype
    task: str = "causal"
    fresh: tuple[str, ...] = ()
    """Layers of the head that the checkpoint does not bring: random, and the adapter's to learn."""

    @property
    def identity(self) -> dict[str, Any]:
        """Name, shape and weight digest, as a saved adapter records them (`graft.attaching.fingerprint`)."""
        return fingerprint(self.model, self.model.__dict__.get("graft_state"))


def load_base(config: BaseConfig | str, task: str = "causal", classes: Sequence[str] = ()) -> Base:
    """The base that a config (or just a name) describes, with the head that the task needs.

    classes: names of the classes in their order, for classification.
    Raises `GraftError` for a folder or hub name that cannot be read, an unknown device, a missing tokenizer, and a head with another
    number of classes.
    """
    config = BaseConfig(model=config) if isinstance(config, str) else config
    tokenizer = load_tokenizer(config)
    model, fresh = _loaded(config, task, classes)
    if task in LABELLED:
        padding = pad_id(tokenizer, model)  # a decoder finds its last token by it
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = padding
    return Base(model, tokenizer, config.model, model.device, model.dtype, task, fresh)


def load_model(config: BaseConfig, task: str = "causal", classes: Sequence[str] = ()) -> Any:
    """The model alone, frozen, in evaluation mode, on its device."""
    return _loaded(config, task, classes)[0]


def own_classes(config: BaseConfig) -> tuple[str, ...] | None:
    """Names of the classes that the base's own head tells apart, in their order; None where it has no such head, or it is not wanted."""
    if config.head == "fresh":
        return None
    source, options = _source(config)
    with _explained(config, source):
        found: Any = AutoConfig.from_pretrained(source, **options)
    return tuple(found.id2label[number] for number in range(found.num_labels)) if _has_head(found) else None


def own_task(config: BaseConfig) -> str:
    """What the base's own head is for."""
    source, options = _source(config)
    with _explained(config, source):
        found = AutoConfig.from_pretrained(source, **options)
    if _has_head(found):
        return "regression" if found.problem_type == "regression" else "classification"
    return "seq2seq" if found.is_encoder_decoder else "causal"


def pad_id(tokenizer: Any, model: Any = None) -> int:
    """What padding is filled with. Masks go by position, but encoders that count positions by ids need the model's own."""
    own = None if model is None else model.config.get_text_config().pad_token_id
    return next((each for each in (own, tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


def _has_head(found: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in found.architectures or ())


def _loaded(config: BaseConfig, task: str, classes: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """The model, and the layers of its head that were drawn at random."""
    device = check_device(config.device)
    dtype = _dtype(config.dtype, device)
    source, options = _source(config)
    drawn = config.head == "fresh"
    if drawn and task not in LABELLED:
        raise GraftError(f"base.head: fresh is for data.task {' and '.join(LABELLED)}; this run's is {task}")
    with _explained(config, source):
        found = AutoConfig.from_pretrained(source, **options)
        if config.attention != "auto":
            options["attn_implementation"] = config.attention
        if task in LABELLED:
            _set_labels(found, config, task, classes)
        with _calmly(task):
            loaded: Any = _CLASSES[task].from_pretrained(
                source, config=found, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=drawn, **options
            )
        model, info = loaded
    others = sorted(each if isinstance(each, str) else each[0] for each in info["mismatched_keys"])
    missing, fresh = sorted({*info["missing_keys"], *others}), ()
    if task in LABELLED and (missing or drawn):
        fresh, missing = fresh_modules(model, missing), []
        fresh = tuple(dict.fromkeys((*fresh, *head_modules(model)))) if drawn else fresh
        draw_head(model, fresh, seed=0)
    if missing:
        # transformers has filled them with random numbers
        raise GraftError(
            f"base.model: the weights in {source} lack {len(missing)} tensors of {type(model).__name__}, among them "
            f"'{missing[0]}'"
        )
    return model.requires_grad_(False).eval().to(device), fresh


def load_as_saved(config: BaseConfig) -> Any:
    """The model alone, as the class that its own config names, in evaluation mode: what reading and writing adapter files needs."""
    device, (source, options) = check_device(config.device), _source(config)
    with _explained(config, source):
        found = AutoConfig.from_pretrained(source, **options)
        cls = getattr(transformers, (found.architectures or ["-"])[0], AutoModelForCausalLM)
        model: Any = cls.from_pretrained(source, config=found, dtype=_dtype(config.dtype, device), **options)
    return model.requires_grad_(False).eval().to(device)


def _set_labels(found: Any, config: BaseConfig, task: str, classes: Sequence[str]) -> None:
    """Names and number of labels. Raises `GraftError` where the base's own head has another number."""
    count = len(classes) if task == "classification" else 1
    if _has_head(found) and found.num_labels != count and config.head == "auto":
        raise GraftError(
            f"base.model '{config.model}' brings a head for {found.num_labels} labels ({', '.join(found.id2label.values())}), but the data "
            f"have {count}: base.head: fresh draws a new one"
        )
    found.id2label = dict(enumerate(classes)) if task == "classification" else {0: "LABEL_0"}
    found.label2id = {name: number for number, name in found.id2label.items()}
    found.problem_type = "regression" if task == "regression" else "single_label_classification"


@contextmanager
def _calmly(task: str) -> Iterator[None]:
    """Without transformers' table of the tensors of a head that were not there: the run says it in a line."""
    level = logging.get_verbosity()
    if task in LABELLED:
        logging.set_verbosity_error()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        logging.set_verbosity(level)


def load_tokenizer(config: BaseConfig) -> Any:
    """The tokenizer alone. Raises `GraftError` when the model comes without one."""
    source, options = _source(config)
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in _TOKENIZER_FILES):
        # transformers would build an empty tokenizer of the model's type here, which turns every text into nothing
        raise GraftError(f"{source} holds no tokenizer (looked for {', '.join(_TOKENIZER_FILES)})")
    with _explained(config, source):
        return AutoTokenizer.from_pretrained(source, **options)


def check_device(name: str) -> torch.device:
    """The device of that name; auto is the first GPU, else the CPU. Raises `GraftError` for one that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    if name == "cpu" or (name == "mps" and mps):
        return torch.device(name)
    number = re.fullmatch(r"cuda(?::(\d+))?", name)
    if number and int(number[1] or 0) < count:
        return torch.device("cuda", int(number[1] or 0))
    there = ["cpu", *(f"cuda:{index}" for index in range(count)), *(["mps"] if mps else [])]
    raise GraftError(f"base.device: there is no device '{name}' here; there is {', '.join(there)} (or auto)")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _source(config: BaseConfig) -> tuple[str, dict[str, Any]]:
    """Folder or hub name to load from, and the options that go with it."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.model == SEEDLING:
        from graft import seedling

        return str(seedling.path()), options
    path = Path(config.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "; it holds an adapter, which needs its base" if (path / "adapter_config.json").is_file() else ""
            raise GraftError(f"base.model: the folder {path} holds no model (config.json is missing){hint}")
        return str(path), options
    if path.is_file():
        raise GraftError(f"base.model: {path} is a file; name the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.model) or config.model.startswith("."):
        raise GraftError(f"base.model: there is no folder {path}.{_near(path)}")
    if config.revision is not None:
        options["revision"] = config.revision
    return config.model, options


def _near(path: Path) -> str:
    """A sentence with the folder that was probably meant."""
    parent = next((parent for parent in path.parents if parent.is_dir()), None)
    if parent is None:
        return ""
    folders = [found.name for found in parent.iterdir() if found.is_dir()]
    missing = path.relative_to(parent).parts[0]
    if missing == str(path) and nearest(missing, [SEEDLING]):
        return f" Did you mean '{SEEDLING}'?"
    if found := nearest(missing, folders):
        return f" Did you mean '{parent / found}'?"
    return f" {parent} holds {', '.join(sorted(folders)[:8]) or 'no folders'}."


@contextmanager
def _explained(config: BaseConfig, source: str) -> Iterator[None]:
    """Say what transformers could not load, and where it looked."""
    local = Path(source).is_dir()
    try:
        yield
    except ImportError as error:
        if config.attention == "flash_attention_2":
            raise MissingExtra("flash_attn", "gpu") from error
        raise GraftError(f"base.model '{config.model}' needs a package that is not installed: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason and not config.trust_remote_code:
            raise GraftError(
                f"base.model '{config.model}' brings code of its own, which would run on this machine. If you trust it, set "
                "base.trust_remote_code: true"
            ) from error
        if local:
            raise GraftError(f"base.model: the model in {source} cannot be loaded: {reason}") from error
        raise GraftError(
            f"base.model: '{config.model}' is not a folder here, and reading it from the hub failed: {reason}{_near(Path(source))}"
        ) from error
