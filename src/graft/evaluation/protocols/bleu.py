"""`bleu`: free text against several references, by sacrebleu on lower-cased text with its 13a tokenizer.

With grouped references this equals the scorer of the E2E challenge to two decimals. An output is taken as it stands, without
outer white space; an empty one counts with no matches. The score is of the whole set: no single output is right or wrong.
Decoding: ten beams, as LoRA's authors have it, without their length penalty and their ban on repeated 4-grams.
"""

from __future__ import annotations

from graft.evaluation.protocols.base import OutputProtocol, Rule, same_text
from graft.evaluation.tasks.base import Task


def whole(output: str, task: Task) -> str | None:
    return output.strip() or None


PROTOCOL = OutputProtocol(
    name="bleu",
    version=1,
    beams=10,
    rules={"text": Rule(whole, same_text, "the whole output; sacrebleu BLEU, lowercase, 13a, grouped references")},
)
