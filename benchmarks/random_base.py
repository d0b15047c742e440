"""A LLaMA with random weights and samples of random tokens, for benchmarks of time and memory, which ask nothing of either.

Lengths lie between 60% and 140% of the one asked for; the second half of each sample is what is learnt. The weights come from a seed
and are made where they are needed, in the dtype of the run, so that a base of billions of parameters never lies on the disk.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

SHAPES = {
    "50m": "512,8,1376,8",
    "llama-3.2-1b": "2048,16,8192,32,8",
    "llama-3.2-3b": "3072,28,8192,24,8",
    "llama-3.1-8b": "4096,32,14336,32,8",
}
"""Bases by name; the heads' size is hidden size / heads in all of them."""
TINY = {"shape": "32,2,48,4", "vocabulary": 97, "length": 10, "steps": 4, "repeats": 1, "threads": 1}
"""What --tiny sets: a run of seconds, which measures nothing."""


def add_options(parser: argparse.ArgumentParser, shape: str = "50m", vocabulary: int = 50257) -> None:
    """What every benchmark on such a base can be told."""
    names = ", ".join(SHAPES)
    said = (
        f"{names}, or numbers: hidden size, layers, intermediate size, heads, and key-value heads where they are fewer"
    )
    parser.add_argument("--shape", default=shape, help=said)
    parser.add_argument("--vocabulary", type=int, default=vocabulary)
    parser.add_argument("--length", type=int, default=100, help="tokens of a sample, in the mean")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--quantise", choices=["nf4"], help="linear layers of the blocks in bitsandbytes' 4 bits")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    parser.add_argument("--tiny", action="store_true", help="a base and samples that only prove that the script runs")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with what --tiny sets."""
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    return args


def config_of(args: argparse.Namespace) -> Any:
    """The shape as transformers' configuration. Raises `SystemExit` for one that is neither a name nor numbers."""
    from transformers import LlamaConfig

    try:
        hidden, layers, inner, heads, *few = map(int, str(SHAPES.get(args.shape, args.shape)).split(","))
    except ValueError as error:
        raise SystemExit(
            f"--shape {args.shape}: name one of {', '.join(SHAPES)}, or give four or five numbers"
        ) from error
    return LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=few[0] if few else heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
    )


def write_base(folder: Any, shape: str, rows: int, dtype: str = "float32", tied: bool = True) -> int:
    """Write such a base with the tokenizer of the base that ships with Graft to folder/base, and word problems to folder/rows.jsonl.

    Returns the number of its parameters. shape: hidden size, layers, intermediate size, heads. dtype: of its files. tied: whether the head
    shares the embedding's weight.
    """
    import json

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import graft.seedling
    from graft.quickstart.problems import generate

    tokenizer = AutoTokenizer.from_pretrained(str(graft.seedling.path()))
    hidden, layers, inner, heads = map(int, shape.split(","))
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner}
    few = {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 512}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **few, **ends))
    model.to(getattr(torch, dtype)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = (json.dumps(row) + "\n" for row in generate("train", rows, seed=3))
    (folder / "rows.jsonl").write_text("".join(lines))
    return sum(each.numel() for each in model.parameters())


def make_base(args: argparse.Namespace) -> Any:
    """The base in the dtype of the run, on the GPU where there is one; the same weights in every process."""
    import torch
    from transformers import LlamaForCausalLM

    if args.threads:
        torch.set_num_threads(args.threads)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    torch.manual_seed(0)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config_of(args)).eval()
    finally:
        torch.set_default_dtype(before)
    return quantised(model, model.dtype) if args.quantise else model


def quantised(model: Any, dtype: Any) -> Any:
    """The linear layers of the blocks as bitsandbytes' NF4 layers, which compute in `dtype`; on a GPU the peak of memory begins anew."""
    import torch

    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError as error:
        raise SystemExit("--quantise needs bitsandbytes: pip install 'graft-llm[quant]'") from error

    for path, dense in [each for each in model.model.named_modules() if isinstance(each[1], torch.nn.Linear)]:
        layer = Linear4bit(dense.in_features, dense.out_features, False, dtype, quant_type="nf4", device="meta")
        layer.weight = Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")  # pyright: ignore[reportCallIssue]
        model.model.set_submodule(path, layer.to(dense.weight.device).eval())
    model.is_loaded_in_4bit = True  # what PEFT asks
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return model


def samples(
    args: argparse.Namespace, count: int, seed: int, equal: bool = False, lengths: Sequence[int] | None = None
) -> Any:
    """`count` samples as a data set of Graft's; `equal`: all of the same length; `lengths`: each of its own."""
    from graft.data.datasets import TokenDataset
    from graft.data.samples import Example

    random, made = np.random.default_rng(seed), []
    for row in range(count):
        length = args.length if equal else int(args.length * random.uniform(0.6, 1.4))
        length = lengths[row] if lengths is not None else length
        ids = random.integers(3, args.vocabulary, length).astype(np.int32)
        made.append(Example(ids, np.arange(length) >= length // 2, "random", row + 1))
    return TokenDataset.of(made)
