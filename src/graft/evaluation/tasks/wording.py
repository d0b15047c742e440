"""Write a question and its choices as one instruction, and read them back from it.

LLM-Adapters (arXiv 2304.01933) stores its sets as complete instructions, such as

    Please choose the correct answer to the question: {question}\\n\\nAnswer1: {..} Answer2: {..}\\n\\nAnswer format: answer1/answer2

A `Wording` holds the fixed parts of such a text. With it, rows of the original data sets become the published instruction, and
a published instruction yields the question and the choices, which ranking needs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """The fixed parts of an instruction."""

    marks: str
    """One character per possible choice, "12345" or "ABCDE". They replace {} in `label` and `mark`."""
    label: str = "{}"
    """The answer that stands for a choice."""
    lead: str = ""
    """Text before the question."""
    intro: str = "\n\n"
    """Text between the question and the first choice."""
    mark: str = "{}: "
    """Text before each choice."""
    separator: str = " "
    """Text between choices."""
    tail: str = ""
    """Text after the last choice. {} is replaced by the labels, joined by "/"."""
    alternative: Wording | None = None
    """Another wording that some instructions of the set have. It is used for reading only."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels of the set. A question with fewer choices uses the first ones."""
        return tuple(self.label.format(mark) for mark in self.marks)

    def write(self, question: str, choices: tuple[str, ...]) -> str:
        """Return the instruction."""
        marked = [self.mark.format(mark) + choice for mark, choice in zip(self.marks, choices, strict=False)]
        return self.lead + question + self.intro + self.separator.join(marked) + self._tail(len(choices))

    def read(self, instruction: str) -> tuple[str, tuple[str, ...]] | None:
        """Return the (question, choices) from which `write` makes this instruction; None if it has another wording."""
        found = self._read(instruction)
        return self.alternative.read(instruction) if found is None and self.alternative is not None else found

    def _read(self, instruction: str) -> tuple[str, tuple[str, ...]] | None:
        # Search for the first choice from the end, because the question itself may contain the same words.
        first = instruction.rfind(self.intro + self.mark.format(self.marks[0]))
        if first < 0 or not instruction.startswith(self.lead):
            return None
        question, rest = instruction[len(self.lead) : first], instruction[first + len(self.intro) :]
        rest = rest[len(self.mark.format(self.marks[0])) :]
        choices = []
        for mark in self.marks[1:]:
            choice, found, after = rest.partition(self.separator + self.mark.format(mark))
            if not found:
                break
            choices.append(choice)
            rest = after
        tail = self._tail(len(choices) + 1)
        if not rest.endswith(tail):
            return None
        return question, (*choices, rest.removesuffix(tail))

    def _tail(self, count: int) -> str:
        return self.tail.replace("{}", "/".join(self.labels[:count]))


@dataclass(frozen=True)
class FixedChoices(Wording):
    """A wording of questions that all have the same choices, such as true and false, which are not listed."""

    choices: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.choices

    def write(self, question: str, choices: tuple[str, ...]) -> str:
        return self.lead + question + self.tail

    def read(self, instruction: str) -> tuple[str, tuple[str, ...]] | None:
        if not instruction.startswith(self.lead) or not instruction.endswith(self.tail):
            return None
        return instruction.removeprefix(self.lead).removesuffix(self.tail), self.choices
