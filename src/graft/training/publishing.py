"""Publish a job: write the adapter folder, or the trained model, that users take, with its template and model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from graft.attaching.saving import save
from graft.bases.vocabulary import tokenizer_files
from graft.bases.whole import write_model
from graft.data.batches import Layout
from graft.runs.folder import RunFolder
from graft.training.assembly import JobParts, RunParts
from graft.training.job import Job
from graft.training.records.model_card import model_card
from graft.utils.clock import timed
from graft.utils.files import new_dir


@timed("checkpoints")
def publish(parts: RunParts, folder: RunFolder, job: Job, last_loss: float | None, layout: Layout) -> None:
    """Write adapters/<name>: weights, configuration, template and model card. A base that trained itself is written to model/.

    last_loss: training loss of the job's last step. layout: that of the run's batches. The card names both.
    """
    part = parts.of(job)
    counts, template = part.data.report.train, part.data.template
    facts: dict[str, Any] = {
        "Data": f"{', '.join(source.name for source in part.data.report.sources)}: {counts.samples:,} samples, "
        f"{counts.tokens:,} tokens, {_supervised(part)}",
        **({"Left out": " ".join(part.data.report.left_out)} if part.data.report.left_out else {}),
        "Classes" if part.data.classes else "Template": f"{template.name} ({template.digest[:12]})",
        "Hardware": f"{parts.base.device}, {str(parts.base.dtype).removeprefix('torch.')}, {layout} batches",
    }
    best = f"Validation loss (step {job.best['step']:.0f}, the weights here)" if job.best else "Validation loss"
    losses = {"Training loss of the last step": last_loss, best: job.best["loss"] if job.best else None}
    card = model_card(part.config, job, losses, facts, len(part.data.classes))
    if job.trainable.adapter is None:
        with new_dir(folder.model_dir) as fresh:
            write_model(parts.base, fresh, job.trainable.whole())
            template.save(fresh)
            (fresh / "README.md").write_text(card, encoding="utf-8")
        return
    files = texts_of(template)
    if parts.base.added:
        files |= tokenizer_files(parts.base.tokenizer)
    files["README.md"] = card
    save(parts.base.model, job.name, folder.adapter_dir(job.name), extra_files=files)


def texts_of(template: Any) -> dict[str, str]:
    """Return the files of a template by name: it saves itself to a folder, and `graft.save` takes texts."""
    with tempfile.TemporaryDirectory() as scratch:
        template.save(scratch)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(scratch).iterdir())}


def _supervised(part: JobParts) -> str:
    """How many targets the job's data have, in words."""
    if len(part.data.train.labels):
        return "one label each"
    if part.data.report.marked:
        return f"{part.data.report.train.targets:,} of answers that are marked good or bad"
    if part.data.report.pairs:
        return f"{part.data.report.train.targets:,} of answers, preferred and rejected"
    return f"{part.data.report.train.targets:,} supervised ({part.config.data.train_on})"
