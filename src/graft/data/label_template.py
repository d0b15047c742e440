"""In place of a template, where an adapter gives labels: it names them, and refuses to write questions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.data.encoding import Span
from graft.data.labelling import Labelling
from graft.data.samples import Message
from graft.data.template import Template
from graft.errors import GraftError


@dataclass(frozen=True)
class LabelTemplate(Template):
    """The labels of a model that answers no questions."""

    labelling: Labelling = Labelling("regression")

    @classmethod
    def of(cls, labelling: Labelling) -> LabelTemplate:
        """For these labels."""
        return cls(labelling.name, None, labelling)

    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Span]:
        raise GraftError(
            f"this adapter was trained for {self.labelling.task}: it gives labels to texts and writes no answers. Use graft predict, or "
            "graft eval with --data FILE"
        )

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Any) -> list[int]:
        self._spans(messages, True)
        return []

    def stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        return ()

    def content(self) -> dict[str, Any]:
        return asdict(self.labelling)

    def save(self, folder: str | Path) -> None:
        self.labelling.save(folder)
