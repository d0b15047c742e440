"""Every checkpoint of the reference set either gives what its own library computed, or is refused by the name of what Graft lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import graft
from tests.formats.oracle import cases, largest_difference

REFUSED = {"peft": "boft beft c3a fourierft hra randlora road vblora"}
"""Parts of the names of cases whose kind, or whose way of computing it, Graft has not. Of AdapterHub's there are none."""


@pytest.mark.parametrize("library", ["peft", "adapters"])
def test_every_case_matches_or_is_refused_by_name(shared: Path, library: str) -> None:
    refused = re.compile("|".join(map(re.escape, REFUSED.get(library, "nothing").split())))
    for name in cases(shared, library):
        folder = shared / "oracle" / library / name
        if name == "t5-compacter":  # the library forgets to write the rule
            with pytest.raises(graft.GraftError, match="1 missing: shared_parameters.fx.phm_rule"):
                largest_difference(folder)
        elif refused.search(name):
            with pytest.raises(graft.GraftError, match="which Graft lacks|Graft has no kind for|has no equal"):
                largest_difference(folder)
        else:
            assert largest_difference(folder) <= 1, name
