"""A plain training loop for a model of PEFT's: AdamW, clipping, one padded batch per step, and nothing else."""

from __future__ import annotations

import time
from typing import Any


def peft_loop(model: Any, steps: list[list[Any]], lr: float, clip: float) -> dict[str, list[float]]:
    """Train on each step's examples as one batch; loss, seconds and real tokens of each step."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    kept: dict[str, list[float]] = {"loss": [], "seconds": [], "tokens": []}
    for examples in steps:
        started = time.perf_counter()
        batch = {key: tensor.to(model.device) for key, tensor in padded(examples).items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept["loss"].append(loss.item())
        kept["seconds"].append(time.perf_counter() - started)
        kept["tokens"].append(sum(len(example) for example in examples))
    return kept


def padded(examples: list[Any]) -> dict[str, Any]:
    """The examples as transformers' models take them: padded on the right, -100 where nothing is learnt."""
    import torch

    width = max(map(len, examples))
    ids, labels = torch.zeros(len(examples), width, dtype=torch.long), torch.full((len(examples), width), -100)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        own = torch.from_numpy(example.input_ids).long()
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
        labels[row, : len(own)] = torch.where(torch.from_numpy(example.supervised), own, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
