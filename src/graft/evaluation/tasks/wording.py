"""How a question and its choices stand in one instruction, written and read back.

LLM-Adapters (arXiv 2304.01933) stores its sets as finished instructions, such as

    Please choose the correct answer to the question: {question}\\n\\nAnswer1: {..} Answer2: {..}\\n\\nAnswer format: answer1/answer2

A `Wording` holds the fixed parts of such a text, so that upstream rows become the published instruction, and a published
instruction gives back the question and the choices that ranking needs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """The fixed parts of an instruction."""

    marks: str
    """One character per possible choice: "12345" or "ABCDE"; they take the place of {} below."""
    label: str = "{}"
    """What the model is to answer for a choice."""
    lead: str = ""
    """Before the question."""
    intro: str = "\n\n"
    """Between the question and the first choice."""
    mark: str = "{}: "
    """Before each choice."""
    joint: str = " "
    """Between choices."""
    tail: str = ""
    """Behind the last choice; {} stands for the labels, joined by "/"."""
    otherwise: Wording | None = None
    """How some instructions of the set are worded instead; they are read so, never written."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers that the set knows, of which a question may use the first few."""
        return tuple(self.label.format(mark) for mark in self.marks)

    def write(self, question: str, choices: tuple[str, ...]) -> str:
        """The instruction."""
        marked = [self.mark.format(mark) + choice for mark, choice in zip(self.marks, choices, strict=False)]
        return self.lead + question + self.intro + self.joint.join(marked) + self._tail(len(choices))

    def read(self, instruction: str) -> tuple[str, tuple[str, ...]] | None:
        """(question, choices) such that `write` gives the instruction back; None where it is worded in no known way."""
        found = self._read(instruction)
        return self.otherwise.read(instruction) if found is None and self.otherwise is not None else found

    def _read(self, instruction: str) -> tuple[str, tuple[str, ...]] | None:
        first = instruction.rfind(self.intro + self.mark.format(self.marks[0]))
        if first < 0 or not instruction.startswith(self.lead):
            return None
        question, rest = instruction[len(self.lead) : first], instruction[first + len(self.intro) :]
        rest = rest[len(self.mark.format(self.marks[0])) :]
        choices = []
        for mark in self.marks[1:]:
            choice, found, behind = rest.partition(self.joint + self.mark.format(mark))
            if not found:
                break
            choices.append(choice)
            rest = behind
        tail = self._tail(len(choices) + 1)
        if not rest.endswith(tail):
            return None
        return question, (*choices, rest.removesuffix(tail))

    def _tail(self, count: int) -> str:
        return self.tail.replace("{}", "/".join(self.labels[:count]))


@dataclass(frozen=True)
class FixedChoices(Wording):
    """The choices are the same for every question and are not listed: true or false."""

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
