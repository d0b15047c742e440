"""The run that the campaigns break: three jobs on the embedded base, two in memory; what has to be the same afterwards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

RUN = """\
base: {{model: seedling, device: cpu}}
adapter: {{kind: lora, rank: 4, alpha: 8, dropout: 0.1, sites: attn.q attn.v}}
data: {{train: d.jsonl, validation: 4, template: plain, max_length: 128, cache: false}}
train: {{steps: {steps}, batch_size: 2, lr: 3e-3, save_every: 3, keep: 2, validate_every: 4}}
jobs:
  lora:
  series: {{adapter: {{kind: series, bottleneck: 8, dropout: 0.1}}, train: {{steps: 5, seed: 3}}}}
  prompt: {{adapter: {{kind: prompt, tokens: 4}}, train: {{lr: 1e-2}}}}
scheduler: {{resident: 2, together: 2}}
"""


def write_run(folder: Path, steps: int = 7) -> Path:
    """Write data and YAML, both with relative paths."""
    draw, lines = random.Random(0), []
    for _ in range(24):
        one, two = draw.randint(1, 50), draw.randint(1, 50)
        tail = "The cat sat. " * draw.randint(0, 3)
        lines.append(
            json.dumps({"instruction": f"add {one} and {two}", "output": f"{one} and {two} are {one + two}. {tail}"})
        )
    (folder / "d.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.yaml").write_text(RUN.format(steps=steps))
    return folder


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what no two runs share."""
    free = {"tokens_per_second", "seconds", "memory_bytes"}
    return [
        {key: value for key, value in json.loads(line).items() if key not in free}
        for line in path.read_text().splitlines()
    ]


def taken(run: Path) -> dict[str, Any]:
    """What an interrupted run shares with an unbroken one, bit for bit."""
    journal = run / "jobs/journal.jsonl"
    commands = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return {
        "adapters": {
            path.parent.name: path.read_bytes() for path in sorted(run.glob("adapters/*/adapter_model.safetensors"))
        },
        "cards": {path.parent.name: path.read_text() for path in sorted(run.glob("adapters/*/README.md"))},
        "metrics": lines_of(run / "metrics.jsonl"),
        "samples": (run / "samples.jsonl").read_text(),
        "commands": [(command["do"], command["job"], command["step"]) for command in commands],
    }


def wrong(run: Path, truth: dict[str, Any]) -> list[str]:
    """What is wrong with a run that has ended: differences, lost or doubled commands, leftovers."""
    found, said = taken(run), []
    if sorted(each[:2] for each in found["commands"]) != sorted(each[:2] for each in truth["commands"]):
        said.append(f"commands {found['commands']}")
    if found["commands"] == truth["commands"]:  # else they waited in the inbox when the run was killed
        said += [f"{what} differ" for what in truth if found[what] != truth[what]]
    steps = [(line["step"], line["job"], "validation_loss" in line) for line in found["metrics"]]
    said += ["metrics are doubled"] if len(set(steps)) != len(steps) else []
    said += [f"{path.relative_to(run)} is left behind" for path in run.rglob("*") if _is_left(path)]
    said += [] if (run / "lock.json").exists() else ["no lock.json"]
    for path in run.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line)
    return said


def torn(run: Path) -> list[str]:
    """Files under their final names that are not whole, right after a kill."""
    from safetensors import SafetensorError, safe_open

    said = []
    for path in run.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(run).parts) or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="numpy") as file:
                    assert len(list(file.keys()))
        except (ValueError, SafetensorError) as error:
            said.append(f"{path.relative_to(run)} is torn: {error}")
    return said


def _is_left(path: Path) -> bool:
    hidden = path.name.startswith(".") and path.name != ".lock"
    return path.name.endswith((".tmp", ".old", ".damaged")) or hidden or path.name == "aside"
