"""A PEFT folder on disk: its config with every field known, and its tensors under today's names of PEFT and of the base."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from graft.architectures.old_names import OldNames
from graft.errors import GraftError
from graft.formats.fields import known
from graft.formats.foreign import CONFIG, AdapterFile, read_config
from graft.formats.peft.fields import FIELDS
from graft.formats.peft.keys import current, in_this_release, names_now

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""The modules that PEFT saves for a task, whether `modules_to_save` names them or not."""


class PeftFile(AdapterFile):
    """The adapter of a folder, for one base."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        """Raises `GraftError` for kinds that Graft lacks, fields that it cannot read, and a damaged file."""
        given = read_config(folder)
        self.kind = str(given.get("peft_type"))
        if self.kind not in FIELDS:
            raise GraftError(
                f"{folder} holds an adapter of PEFT's kind {self.kind}, which Graft lacks. It reads: {', '.join(FIELDS)}"
            )
        config = known(FIELDS[self.kind], given, str(folder / CONFIG), f"PEFT's {self.kind}")
        super().__init__(folder, config, "")
        self.old = OldNames(model)
        self.elsewhere: list[str] = []
        """Paths of modules that the config may name, and whose weights this base keeps in a stack."""
        named = current(self.left, str(folder))
        self.left = in_this_release(named, model, self.old, str(folder))
        self.kept, self.renamed = dict(self.left), self.left.keys() != named.keys()
        if "modules_to_save" in config:
            config["modules_to_save"] = [*(config["modules_to_save"] or ()), *HEADS.get(config["task_type"], ())]
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(config.get(field), list):
                config[field] = names_now(config[field], model, self.old)
