"""Broken runs, seeded: a run that works, with random damage to its text, its values, and the changes on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

HOSTILE = (
    "null",
    "true",
    "-1",
    "0",
    "1",
    "2",
    "1e400",
    "-.inf",
    ".nan",
    "1e-300",
    "1e300",
    "9223372036854775807",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "1_000",
    "1:30",
    "2001-12-12",
    "''",
    "' '",
    "x" * 300,
    "é日本",
    "'\\0'",
    '"\\0"',
    '"\\u001b[2J"',
    '"\\ud83d"',
    "[]",
    "{}",
    "[[]]",
    "{a: {b: c}}",
    "[1, two, null]",
    "re:(a+)+b",
    "re:(",
    "re:((a{1000}){1000}){1000}",
    "re:.*",
    "*x",
    "&x y",
    "!!binary abc=",
    "!tag x",
    "<<",
    "=",
    "- a",
    "? b",
    "lora",
    "ia3",
    "stack",
    "llm-adapters/lora",
    "seedling",
    "../..",
    "/",
    "/dev/zero",
    "~",
    "auto",
    "cuda:99",
    "16.5",
    "'16'",
    "%s",
    "{x}",
    "\\",
    "#",
    "full",
    "prefix",
    "embed",
    "linear",
    "attn.q@last1",
    "attn.q@9",
    "mlp?",
    "experts.up",
    "head",
    "0.5",
    "[attn.q, mlp.up]",
    "no such file.json",
)
"""Values that settings get."""
KEYS = (
    "base",
    "base.model",
    "base.dtype",
    "base.device",
    "base.revision",
    "base.attention",
    "base.head",
    "base.dropout",
    "adapter",
    "adapter.kind",
    "adapter.rank",
    "adapter.alpha",
    "adapter.sites",
    "adapter.dropout",
    "adapter.rank_pattern",
    "adapter.preset",
    "adapter.0.rank",
    "adapter.tokens",
    "data",
    "data.train",
    "data.task",
    "data.labels",
    "data.validation",
    "data.template",
    "data.system",
    "data.max_length",
    "data.overlong",
    "data.train_on",
    "data.seed",
    "data.train.path",
    "data.train.fields",
    "data.train.limit",
    "data.train.weight",
    "data.train.format",
    "train",
    "train.epochs",
    "train.steps",
    "train.batch_size",
    "train.token_budget",
    "train.lr",
    "train.schedule",
    "train.warmup",
    "train.betas",
    "train.clip",
    "train.seed",
    "train.layout",
    "train.kernels",
    "train.loggers",
    "train.init_from",
    "train.validate_every",
    "train.patience",
    "train.objective",
    "train.keep",
    "eval.tasks",
    "eval.protocol",
    "eval.data",
    "eval.limit",
    "scheduler.memory",
    "scheduler.halving",
    "scheduler.together",
    "jobs",
    "jobs.a.train.lr",
    "jobs.a",
    "lr",
    "train.lr.peak",
    "data.train.9999999999",
    "",
    ".",
    "train..lr",
    "0",
    "train.0",
    "\u0661.x",
)
TEXTS = (
    "",
    "\0",
    "---\n---\n",
    "\ufeff",
    "\t",
    "[" * 3000,
    "{a: " * 300,
    "%YAML 9\n",
    "a: &a [*a]\n",
    "x: !!python/object:os.system y\n",
    "\x85\u2028",
)


def valid(model: str, data: str) -> str:
    """Return the text of a run that works."""
    return (
        f"base: {{model: {model}, device: cpu}}\nadapter:\n  kind: lora\n  rank: 2\n  sites: attn.q\n"
        f"data:\n  train: {data}\n  template: plain\n  max_length: 64\n  validation: 2\n  cache: false\n"
        "train:\n  steps: 2\n  batch_size: 2\n  lr: 1e-3\n  seed: 1\n  loggers: []\neval:\n  limit: 2\n"
    )


def broken_runs(seed: int, count: int, model: str, data: str) -> Iterator[tuple[bytes, list[str]]]:
    """Yield the bytes of a YAML file and the changes on top of it."""
    random = Random(seed)
    for _ in range(count):
        text, changes = valid(model, data), []
        if random.random() < 0.5:
            for _ in range(random.randint(1, 3)):
                text = random.choice((_value, _value, _value, _line, _character, _typo, _text))(random, text)
        if random.random() < 0.6:
            changes = [f"{random.choice(KEYS)}={random.choice(HOSTILE)}" for _ in range(random.randint(1, 3))]
        content = text.encode("utf-8", "surrogatepass")
        if random.random() < 0.05:
            at = random.randrange(len(content) + 1)
            content = content[:at] + random.randbytes(random.randint(1, 40)) + content[at:]
        yield content, [change for change in changes if "\0" not in change]


def _value(random: Random, text: str) -> str:
    """Give a key another value."""
    lines = text.splitlines() or [""]
    at = random.randrange(len(lines))
    key, colon, _ = lines[at].partition(": ")
    lines[at] = f"{key}: {random.choice(HOSTILE)}" if colon else lines[at] + " " + random.choice(HOSTILE)
    return "\n".join(lines) + "\n"


def _line(random: Random, text: str) -> str:
    """Remove, double, move or indent a line."""
    lines = text.splitlines() or [""]
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    change: Any = random.choice(("remove", "double", "swap", "indent", "dedent"))
    if change == "remove":
        del lines[at]
    elif change == "double":
        lines.insert(other, lines[at])
    elif change == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = "  " + lines[at] if change == "indent" else lines[at].removeprefix("  ")
    return "\n".join(lines) + "\n"


def _character(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    if random.random() < 0.4:
        return text[:at] + text[at + 1 :]
    return text[:at] + random.choice("{}[]:,&*!|>'\"%@`#-?\\\t\x07é日\u202e\u200b\U0001f600") + text[at:]


def _typo(random: Random, text: str) -> str:
    """Spell a word wrong."""
    words = [word for word in text.replace(":", " ").split() if word.isalpha()]
    if not words:
        return text
    word = random.choice(words)
    at = random.randrange(len(word))
    return text.replace(word, word[:at] + random.choice(("", "x", word[at] * 2)) + word[at + 1 :], 1)


def _text(random: Random, text: str) -> str:
    """Cut the text, or put something else in."""
    at = random.randrange(len(text) + 1)
    return text[:at] if random.random() < 0.3 else text[:at] + random.choice(TEXTS) + text[at:]
