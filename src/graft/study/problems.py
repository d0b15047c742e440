"""The word problems of a study on the embedded base, as three files without a row in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.quickstart.problems import generate
from graft.study.definition import Study
from graft.utils.files import write_text_atomic


def with_problems(study: Study, out: Path) -> Study:
    """Write the problems that a study asks for into its folder, and return the study with them as its data.

    The held-out rows share neither wordings nor numbers with the training rows; validation and test share no row.
    """
    wanted = study.config.problems
    if wanted is None:
        return study
    validation = generate("heldout", wanted.validation, seed=1)
    known = {row["instruction"] for row in validation}
    spare = [row for row in generate("heldout", 4 * wanted.test + 50, seed=2) if row["instruction"] not in known]
    test = list({row["instruction"]: row for row in spare}.values())[: wanted.test]
    folder = out / "problems"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"train": generate("train", wanted.train), "validation": validation, "test": test}
    files = {name: folder / f"{name}.jsonl" for name, each in rows.items() if each}
    for name, path in files.items():
        text = "".join(
            json.dumps({"instruction": row["instruction"], "output": row["output"]}) + "\n" for row in rows[name]
        )
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text_atomic(path, text)
    data: dict[str, Any] = {"train": str(files["train"])}
    if "validation" in files:
        data["validation"] = str(files["validation"])
    base = replace(study.base, data={**study.base.data, "data": {**_mapping(study.base.data.get("data")), **data}})
    test_file = str(files["test"]) if "test" in files else None
    return replace(study, base=base, config=study.config.model_copy(update={"test": test_file}))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
