"""Broken adapter folders, drawn from a seed: one whole folder of each format and kind, and one thing in it changed.

`fuzz(seed)` gives a folder, what was done to it, and whether it may still load to other numbers: a byte inside of a file without a
checksum, or a number in a config that is as good as the old one, cannot be told from what was meant.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import graft
from tests.contract.table import base, randomise

LORA = graft.LoRA(rank=2, sites="attn.q attn.v")
WHOLE: dict[str, tuple[str, Any]] = {
    "own lora": ("graft", LORA),
    "own stack": ("graft", graft.Stack(adapters=(graft.Prefix(tokens=2), graft.Series(bottleneck=4), graft.Full(sites="norm")))),
    "own adalora": ("graft", graft.AdaLoRA(init_rank=3, target_rank=None)),
    "own shira": ("graft", graft.SHiRA(rank=1, sites="attn.q")),
    "peft lora": ("peft", graft.Stack(adapters=(LORA, graft.Full(sites="norm"), graft.Full(sites="embed", tokens=(3, 5))))),
    "peft dora": ("peft", graft.DoRA(rank=2, sites="attn.q", train_bias=False)),
    "peft lokr": ("peft", graft.LoKr(rank=2, sites="mlp.up")),
    "peft adalora": ("peft", graft.AdaLoRA(init_rank=3, target_rank=None, sites="attn.q")),
    "peft ia3": ("peft", graft.IA3()),
    "peft vera": ("peft", graft.VeRA(rank=2, sites="attn.q")),
    "peft shira": ("peft", graft.SHiRA(rank=1, sites="attn.q", mask_per="shape")),
    "peft prompt": ("peft", graft.PromptTuning(tokens=2, window="hides")),
    "peft prefix": ("peft", graft.Prefix(tokens=2, positions="after_prefix", window="hides")),
    "hub lora": ("adapterhub", LORA),
    "hub series": ("adapterhub", graft.Series(bottleneck=4, sites="attn mlp")),
    "hub reft": ("adapterhub", graft.ReFT(rank=2)),
    "fork lora": ("llm-adapters", LORA),
    "fork parallel": ("llm-adapters", graft.Parallel(bottleneck=4, sites="mlp.up", biases=False)),
    "fork prefix": ("llm-adapters", graft.Prefix(tokens=2, positions="after_prefix", window="hides")),
}  # fmt: skip
VALUES = (None, True, False, [], {}, "", "x", "8", -1, 0, 1, 3, 10**6, 10**12, 10**30, 0.5, -2.5, 1e30, [["a"]], {"a": {"b": [1]}},
          ["q_proj", 5],
          "(?:(?:.|.)+)+(?<=Q)", "re:(?:(?:.|.)+)+(?<=Q)", "(", "all-linear", "\x1b]0;x\x07", "../..", "é" * 5000)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A broken folder."""

    folder: Path
    whole: str
    """The name of the folder that it was made from."""
    done: str
    """What was changed."""
    open: bool
    """Whether it may load and compute something else."""


def whole_folders(root: Path) -> dict[str, Path]:
    """Write every whole folder once."""
    for name, (format, spec) in WHOLE.items():
        model = base("llama")
        graft.attach(model, {"a": spec})
        randomise(model, "a")
        folder = root / name.replace(" ", "-")
        graft.save(model, "a", folder) if format == "graft" else graft.export(model, "a", folder, format=format)
    return {name: root / name.replace(" ", "-") for name in WHOLE}


def fuzz(seed: int, whole: dict[str, Path], root: Path) -> Case:
    """Make the broken folder of a seed."""
    draw = random.Random(seed)
    name = draw.choice(sorted(whole))
    folder = root / f"case-{seed}"
    shutil.copytree(whole[name], folder)
    change = draw.choice(
        [_config_value] * 5
        + [_config_bytes, _config_key, _config_text]
        + [_tensors] * 5
        + [_weight_bytes, _pickled, _files]
    )
    done, open_ = change(draw, folder)
    checked = name.startswith("own") and change not in (_config_value, _config_bytes, _config_key, _config_text)
    return Case(folder, name, done, open_ and not checked)


def _weights(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin"))


def _config_value(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """One field of the config, or of a config inside of it, gets a value of any type."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    inside = [
        config,
        *(each for each in (config.get("adapter"), config.get("config"), config.get("base")) if isinstance(each, dict)),
    ]
    fields = draw.choice(inside)
    key, value = draw.choice(sorted(fields)), draw.choice(VALUES)
    fields[key] = value
    path.write_text(json.dumps(config))
    return f"{key} = {value!r:.60}", True


def _config_key(draw: random.Random, folder: Path) -> tuple[str, bool]:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if draw.random() < 0.5:
        config["use_tomorrow"] = draw.choice([True, 5, "x"])
        path.write_text(json.dumps(config))
        return "a field that nobody knows", False
    key = draw.choice(sorted(config))
    config.pop(key)
    path.write_text(json.dumps(config))
    return f"without the field {key}", True


def _config_bytes(draw: random.Random, folder: Path) -> tuple[str, bool]:
    path = folder / "adapter_config.json"
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)
    return "random bytes in the config", True


def _config_text(draw: random.Random, folder: Path) -> tuple[str, bool]:
    path = folder / "adapter_config.json"
    text = path.read_text()
    broken = draw.choice([text[: draw.randrange(len(text) - 2)], "", "[]", "null", "{}", "[" * 10**5, '{"peft_type": NaN}', "\ufeff" + text,
                          '{"peft_type": "LORA"}', '{"format": "graft"}', text.replace("2", "1e999", 1), "\x00" * 10])  # fmt: skip
    path.write_text(broken)
    return f"the config is {broken[:30]!r}", broken == text


def _tensors(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """One tensor is missing, doubled, renamed, of another type or shape, or not finite."""
    path = _weights(folder)
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    name = draw.choice(sorted(found))
    tensor, integers = found[name], not found[name].is_floating_point()
    edits: dict[str, Callable[[], Any]] = {
        "missing": lambda: found.pop(name), "extra": lambda: found.update({f"{name}.more": torch.ones(2)}),
        "renamed": lambda: found.update({name.replace("0", "7", 1) if "0" in name else f"x{name}": found.pop(name)}),
        "int8": lambda: found.update({name: tensor.char()}), "bool": lambda: found.update({name: tensor.bool()}),
        "complex": lambda: found.update({name: tensor.cfloat()}), "empty": lambda: found.update({name: tensor[:0]}),
        "one row less": lambda: found.update({name: tensor[:-1]}), 
        "one row more": lambda: found.update({name: torch.cat([tensor, tensor[:1]])}),
        "one axis more": lambda: found.update({name: tensor[None]}), "flat": lambda: found.update({name: tensor.flatten()[:, None]}),
        "NaN": lambda: found.update({name: tensor.float() * float("nan")}), 
        "infinite": lambda: found.update({name: tensor.double() * 1e308 * 1e308}),
        "1e300": lambda: found.update({name: tensor.double() + 1e300}), "scalar": lambda: found.update({name: torch.tensor(1.0)}),
        "none at all": found.clear, "float64": lambda: found.update({name: tensor.double()}),
        "out of range": lambda: found.update({name: tensor + 1000 if integers else tensor.int()}),
    }  # fmt: skip
    done = draw.choice(sorted(edits))
    edits[done]()
    whole = {key: each.contiguous().clone() for key, each in found.items()}
    save_file(whole, path, metadata={"format": "pt"}) if path.suffix == ".safetensors" else torch.save(whole, path)
    return f"tensor {name}: {done}", False


def _weight_bytes(draw: random.Random, folder: Path) -> tuple[str, bool]:
    path = _weights(folder)
    data = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        path.write_bytes(data[: draw.randrange(len(data))])
        return "weights cut short", False
    for _ in range(draw.randint(1, 6)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)
    return "random bytes in the weights", True


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import os; os.environ['GRAFT_FUZZ_RAN'] = '1'",)


def _pickled(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """The weights are a pickle of something else."""
    path = _weights(folder)
    content = draw.choice(
        [Code(), {"a": Code()}, [1], {"a": 1}, {5: 5}, {"a": torch.ones(1).expand(10**9)}, "x", None, {}]
    )
    target = path if draw.random() < 0.5 else folder / "adapter_model.bin"
    path.unlink()
    target.write_bytes(pickle.dumps(content, protocol=draw.choice([2, 4, 5])))
    return f"a pickle of {type(content).__name__} as {target.name}", False


def _files(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """A file is missing, or something else than a file."""
    path = draw.choice([_weights(folder), folder / "adapter_config.json"])
    path.unlink()
    done = draw.choice(["missing", "a folder", "a pipe", "a link to itself", "empty"])
    if done == "a folder":
        path.mkdir()
    elif done == "a pipe":
        os.mkfifo(path)
    elif done == "a link to itself":
        path.symlink_to(path.name)
    elif done == "empty":
        path.touch()
    return f"{path.name} is {done}", False
