"""Pretrain seedling, a LLaMA-architecture base of a few million parameters, on the text that `corpus.py` writes.

    python pretrain.py --out ../../src/graft/seedling/model
    torchrun --standalone --nproc-per-node 2 pretrain.py --out ...       # the same on two cores, one process on each

Seeded: the same command gives the same tokenizer and the same data in the same order. A checkpoint in `--work` is
written every few minutes; the same command continues from it. The learning rate rises, stays and falls
(warmup-stable-decay, Hu et al. 2024, arXiv:2404.06395).

Shape letters: B blocks in a batch, L tokens in a block, V tokens of the vocabulary (U unseen, S seen), H hidden width.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))

from corpus import documents  # noqa: E402
from tokens import train_tokenizer  # noqa: E402

CONTEXT = 512
TOKENIZER_DOCUMENTS = 60_000
SHARD_DOCUMENTS = 20_000  # about a million tokens
SHARDS_BEFORE_DRILLS = 3  # words and facts come first
LOG_EVERY = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model and tokenizer")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for the checkpoint and the log")
    parser.add_argument("--steps", type=int, default=4580)
    parser.add_argument("--decay-from", type=int, default=3600, help="step at which the learning rate begins to fall")
    parser.add_argument("--decay-to", type=int, default=4800, help="step at which it would be zero; at least --steps")
    parser.add_argument("--batch", type=int, default=4, help="blocks of 512 tokens per step, over all processes")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=640)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 products")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    args = parser.parse_args()
    if not args.decay_from < args.decay_to or args.decay_to < args.steps:
        parser.error("needed: decay-from < decay-to and steps <= decay-to, or the learning rate would be negative")
    return args


def build(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def shard(tokenizer: PreTrainedTokenizerFast, seed: int, index: int) -> np.ndarray:
    """Blocks [number, L] of documents laid end to end, each between `<s>` and `</s>`; what fills no block is dropped."""
    texts = list(documents(seed * 1_000_003 + 1 + index, SHARD_DOCUMENTS, with_drills=index >= SHARDS_BEFORE_DRILLS))
    eos = tokenizer.eos_token_id
    rows = tokenizer(texts)["input_ids"]
    stream = np.fromiter((token for row in rows for token in (*row, eos)), dtype=np.int64)
    return stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)


class Feed:
    """Batches [B, L] in the order of the corpus; `state` and `restore` let a run continue where it stopped."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch: int) -> None:
        self.tokenizer, self.seed, self.batch = tokenizer, seed, batch
        self.index, self.position = 0, 0
        self.blocks = shard(tokenizer, seed, 0)

    def next(self) -> Tensor:
        if self.position + self.batch > len(self.blocks):
            self.index, self.position = self.index + 1, 0
            self.blocks = shard(self.tokenizer, self.seed, self.index)
        rows = self.blocks[self.position : self.position + self.batch]
        self.position += self.batch
        return torch.from_numpy(rows)

    def state(self) -> tuple[int, int]:
        return self.index, self.position

    def restore(self, state: tuple[int, int]) -> None:
        self.index, self.position = state
        self.blocks = shard(self.tokenizer, self.seed, self.index)


def rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate of a step: 100 steps up, flat until `decay_from`, then on a line that reaches zero at `decay_to`."""
    falling = (args.decay_to - step) / (args.decay_to - args.decay_from)
    return args.lr * min(1.0, (step + 1) / 100, falling)


def loss_of(model: LlamaForCausalLM, ids_BL: Tensor, autocast: bool) -> Tensor:
    with torch.autocast(ids_BL.device.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids_BL, use_cache=False).logits  # [B, L, vocabulary]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten())


def optimiser_of(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


class Workers:
    """The processes that share each batch: one, or those that `torchrun` started on this machine.

    On a CPU that other programs use too, two processes of one thread that meet once a step are far faster than one process of
    two threads that meet in every operation.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            torch.distributed.init_process_group("gloo")

    def average_gradients(self, model: LlamaForCausalLM) -> None:
        if self.count == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class Checkpoint:
    """What a run needs to continue, in one file that is replaced as a whole."""

    def __init__(self, path: Path, model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, feed: Feed) -> None:
        self.path, self.model, self.optimiser, self.feed = path, model, optimiser, feed

    def save(self, step: int) -> None:
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        half = self.path.with_suffix(".tmp")
        torch.save({**state, "feed": self.feed.state(), "step": step}, half)
        os.replace(half, self.path)

    def load(self) -> int:
        """Restore everything and return the number of steps done; 0 where there is no file."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True, map_location=self.model.device)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.feed.restore(state["feed"])
        return state["step"]


def train(model: LlamaForCausalLM, feed: Feed, workers: Workers, args: argparse.Namespace) -> None:
    optimiser = optimiser_of(model, args.lr)
    checkpoint = Checkpoint(args.work / "checkpoint.pt", model, optimiser, feed)
    first = checkpoint.load()
    marked = saved = time.monotonic()
    recent: list[float] = []
    for step in range(first, args.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, args)
        ids_BL = feed.next()[workers.rank :: workers.count]
        loss = loss_of(model, ids_BL.to(model.device), args.autocast)
        loss.backward()
        workers.average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % LOG_EVERY == 0 and workers.rank == 0:
            now = time.monotonic()
            speed = len(recent) * args.batch * CONTEXT / (now - marked)
            report(args.work, {"step": step + 1, "loss": sum(recent) / len(recent), "tokens_per_s": speed})
            marked, recent = now, []
        due = time.monotonic() - saved > 60 * args.save_minutes or step + 1 == args.steps
        if due and workers.rank == 0:
            checkpoint.save(step + 1)
            saved = time.monotonic()


def report(work: Path, line: dict[str, float]) -> None:
    text = json.dumps({key: round(value, 4) for key, value in line.items()})
    with open(work / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(text + "\n")
    print(text, flush=True)


def tell_unseen_tokens_apart(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Give each token that the corpus never holds (bytes, parts of words, roles of the chat) a direction of its own.

    Training only pushes such tokens away from every output, all alike, until their embeddings are the same vector and no
    adapter on a frozen base could ever choose between them. They keep that common part, so the base still avoids them, and get
    a random part as long as that of the tokens that were seen.
    """
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for index in (0, SHARDS_BEFORE_DRILLS):  # one shard of each stage holds every word of the corpus
        counts += np.bincount(shard(tokenizer, seed, index).ravel(), minlength=len(tokenizer))
    unseen = torch.from_numpy(counts == 0)
    table_VH = model.get_input_embeddings().weight.data.cpu()  # [vocabulary, hidden]
    common_H, seen_SH = table_VH[unseen].mean(0), table_VH[~unseen]
    length = (seen_SH - seen_SH.mean(0)).norm(dim=1).mean()
    random_UH = torch.randn(int(unseen.sum()), table_VH.shape[1], generator=torch.Generator().manual_seed(seed))
    table_VH[unseen] = common_H + length * F.normalize(random_UH, dim=1)
    model.get_input_embeddings().weight.data.copy_(table_VH)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in bfloat16 and the tokenizer, as `from_pretrained` reads them."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    args = arguments()
    workers = Workers()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents(args.seed, TOKENIZER_DOCUMENTS), CONTEXT)
    model = build(tokenizer, args).to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}, {args.batch * CONTEXT} tokens per step")
    train(model, Feed(tokenizer, args.seed, args.batch), workers, args)
    if workers.rank == 0:
        tell_unseen_tokens_apart(model, tokenizer, args.seed)
        export(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
