"""What two gloo processes run: `python distributed.py ddp|fsdp2 OUT`, under torchrun or with the launcher's environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

import graft
from tests.callers.tiny import rows, tiny_llama

STEPS = 3


def build() -> nn.Module:
    model = tiny_llama()
    torch.manual_seed(5)
    graft.attach(
        model, {"a": graft.LoRA(rank=4), "b": graft.Series(sites="mlp", init="bert"), "p": graft.Prefix(tokens=3)}
    )
    return model.train()


def batch(rank: int, world: int) -> Tensor:
    """This process's share of four rows."""
    ids = torch.tensor([row["input_ids"] for row in rows(4)])
    return ids.chunk(world)[rank]


def train(model: nn.Module, ids: Tensor, name: str) -> None:
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if name == "fsdp2":
            for group in optimizer.param_groups:
                assert all(p.grad is not None for p in group["params"])
        optimizer.step()
        optimizer.zero_grad()


def result(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    def whole(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore

    return {name: whole(p.detach()).clone() for name, p in graft.parameters(model, adapter)}


def main(mode: str, adapter: str, out: str) -> None:
    dist.init_process_group("gloo")
    model = build()
    if adapter != "a":
        graft.set_active(model, adapter)
    if mode == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:  # pyright: ignore
            fully_shard(layer)
        fully_shard(model)
    train(model, batch(dist.get_rank(), dist.get_world_size()), mode)
    found = result(model, adapter)
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
