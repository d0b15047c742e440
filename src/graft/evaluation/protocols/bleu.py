"""`bleu`: compare free text with several references, by sacrebleu on lower-cased text with its 13a tokenizer.

With grouped references this equals the scorer of the E2E challenge to two decimals. The whole output is used, without white
space around it; an empty output has no matches. The score belongs to the whole set: no single output is right or wrong.
Decoding uses ten beams, as the authors of LoRA did, but without their length penalty and their ban on repeated 4-grams.
"""

from __future__ import annotations

from graft.evaluation.protocols.base import OutputProtocol, extracting, same_text
from graft.evaluation.tasks.base import Task


def whole(output: str, task: Task) -> str | None:
    return output.strip() or None


PROTOCOL = OutputProtocol(
    name="bleu",
    version=1,
    beams=10,
    rules={
        "text": extracting(whole, same_text, "the whole output; sacrebleu BLEU, lowercase, 13a, grouped references")
    },
)
