"""A tiny world for the engine: models of several families, samples of random tokens, a run folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import graft
from graft.config.train import TrainConfig
from graft.data.datasets import TokenDataset
from graft.data.samples import Example
from graft.runs.folder import RunFolder
from graft.training.batching import Batcher
from graft.training.engine import Engine
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import set_training
from graft.training.isolation import joint_step
from graft.training.job import Job
from graft.training.records.progress import Reporter
from graft.training.settings import Settings
from graft.training.step import Outcome
from tests.small import save_small

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GATED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GATED),
    "mistral": lambda: transformers.MistralConfig(**GATED, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**GATED),
    "gemma2": lambda: transformers.Gemma2Config(**GATED, head_dim=8, sliding_window=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=6),
    "phi": lambda: transformers.PhiConfig(**SHAPE, intermediate_size=48),
    "gpt2": lambda: transformers.GPT2Config(**OLD),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE, intermediate_size=48),
    "gptj": lambda: transformers.GPTJConfig(**OLD, rotary_dim=8),
    "bloom": lambda: transformers.BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "falcon": lambda: transformers.FalconConfig(**SHAPE, new_decoder_architecture=False, alibi=False),
    "falcon_alibi": lambda: transformers.FalconConfig(**SHAPE, new_decoder_architecture=False, alibi=True),
    "cohere": lambda: transformers.CohereConfig(**GATED, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**GATED, logits_scaling=4.0),
    "mpt": lambda: transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, and equality to the bit is a promise for an equal number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small base and a data file, for whole runs."""
    folder = tmp_path_factory.mktemp("world")
    save_small(folder / "base")
    rows = [{"instruction": f"say {number}", "input": "", "output": f"it is {number * number}"} for number in range(24)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model of a family."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype).eval()


def examples(count: int, seed: int = 0, longest: int = 16) -> list[Example]:
    """Samples of 4 and more random tokens, each with a prompt and an answer."""
    random, made = np.random.default_rng(seed), []
    for row in range(count):
        length = int(random.integers(4, longest + 1))
        supervised = np.arange(length) >= random.integers(1, length)
        made.append(Example(random.integers(3, VOCABULARY, length).astype(np.int32), supervised, "data.jsonl", row + 1))
    return made


def data(count: int, seed: int = 0, longest: int = 16) -> TokenDataset:
    """The same as a data set."""
    return TokenDataset.of(examples(count, seed, longest))


def pairs(count: int, seed: int = 0, longest: int = 8, prompt: int = 0) -> TokenDataset:
    """Pairs of random answers of unequal length to one prompt each, which has `prompt` tokens (0: up to five)."""
    random, made = np.random.default_rng(seed), []
    for row in range(count):
        asked = random.integers(3, VOCABULARY, prompt or int(random.integers(1, 6)))
        sides = []
        for _ in range(2):
            ids = np.concatenate([asked, random.integers(3, VOCABULARY, int(random.integers(1, longest + 1)))])
            sides.append(Example(ids.astype(np.int32), np.arange(len(ids)) >= len(asked), "pairs.jsonl", row + 1))
        sides[0].rejected = sides[1]
        made.append(sides[0])
    return TokenDataset.of(made)


def exact_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the dtype of its input; transformers' own rounds to float32, which hides equality in float64."""
    scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden_states * scale)


def attach(model: Any, name: str = "a", adapter: Any = None, seed: int = 1) -> Any:
    """An adapter whose weights are all away from zero."""
    torch.manual_seed(seed)
    graft.attach(model, {name: adapter or {"kind": "lora", "rank": 4, "sites": "linear"}})
    with torch.no_grad():
        for _, parameter in graft.parameters(model, name):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def job_on(
    model: Any,
    name: str = "a",
    train: TokenDataset | None = None,
    validation: TokenDataset | None = None,
    **config: Any,
) -> Job:
    """A job with a constant learning rate."""
    settings = {"batch_size": 8, "lr": 1e-2, "schedule": "constant", "steps": 6, **config}
    return Job.make(model, name, TrainConfig(**settings), train or data(32), validation)


def engine_for(jobs: list[Job], model: Any, path: Path, publish: Any = None, **settings: Any) -> Engine:
    """An engine in a fresh folder (or the one that is there)."""
    folder = RunFolder(path) if path.exists() else RunFolder(path).create()
    return Engine(
        model,
        jobs,
        folder,
        Settings(pad_id=0, **settings),
        Reporter(jobs[0].steps, quiet=True),
        publish or (lambda job: None),
    )


def batcher(layout: Any = "padded", budget: int = 4096) -> Batcher:
    """A batcher whose padding is token 0."""
    return Batcher(budget, layout, 0)


def take_step(forward: Forward, jobs: list[Job], layout: Any = "flat", budget: int = 4096) -> dict[str, Outcome]:
    """One optimiser step of all jobs; raises the error of a job that fails."""
    outcomes, failures = joint_step(forward, jobs, batcher(layout, budget))
    for error in failures.values():
        raise error
    return outcomes


def step(model: Any, jobs: list[Job], budget: int = 4096, layout: Any = "flat") -> dict[str, Outcome]:
    """One optimiser step in training mode, in a layout."""
    forward = Forward(model)
    decide(forward, jobs, "auto", batcher())
    set_training(model, [job.name for job in jobs])
    with laid_out(model, layout):
        return take_step(forward, jobs, layout, budget)


def gradients(job: Job) -> torch.Tensor:
    """All gradients of a job in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in job.params.values() if parameter.grad is not None])


def assert_same_gradient(given: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal to a share of the largest entry; and not all zero."""
    assert wanted.abs().max() > 0
    assert float((given - wanted).abs().max() / wanted.abs().max()) < tolerance


def losses(folder: Path) -> list[float]:
    """The training losses of a run."""
    return [line["loss"] for line in RunFolder(folder).metrics.read() if "loss" in line]


LORA = {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.2}


def fresh(
    path: Path, adapter: Any = LORA, publish: Any = None, settings: dict[str, Any] | None = None, **job: Any
) -> Engine:
    """An engine with one job on a fresh tiny model."""
    model = attach(tiny(), adapter=adapter)
    return engine_for([job_on(model, **job)], model, path, publish, **(settings or {}))


def events(path: Path) -> list[str]:
    """What happened in a run, in order."""
    return [json.loads(line)["event"] for line in (path / "events.jsonl").read_text().splitlines()]


class PowerCut(BaseException):
    """What no run can catch."""


def breaks_at(job: Any, step: int) -> Any:
    """Rows of a job that end in a power cut at one step."""
    plain = job.rows

    def rows() -> Any:
        if job.step == step:
            raise PowerCut
        return plain()

    return rows
