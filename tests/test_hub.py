"""A hub that does not answer is asked once, briefly; then only what is cached counts."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import constants

from graft.bases import load_tokenizer
from graft.config.base import BaseConfig
from graft.data.reading import read
from graft.errors import GraftError
from graft.utils import hub


class Silent:
    """A session to a hub that cannot be reached."""

    asked = 0

    def head(self, url: str, timeout: float) -> None:
        Silent.asked += 1
        assert timeout <= 5
        raise ConnectionError("Name or service not known")


def test_it_is_asked_once_and_not_retried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", Silent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.answers.cache_clear()
    Silent.asked = 0
    import datasets  # noqa: F401

    start = time.monotonic()
    try:
        with pytest.raises(
            GraftError, match="'no/such-model' is not a folder here, and reading it from the hub failed"
        ):
            load_tokenizer(BaseConfig(model="no/such-model"))
        with pytest.raises(GraftError, match="no/such-data: there is no such file, and loading it from the hub failed"):
            read("no/such-data")
    finally:
        hub.answers.cache_clear()
    assert time.monotonic() - start < 10 and Silent.asked == 1
    assert constants.HF_HUB_OFFLINE is False
    said = capsys.readouterr()
    assert "Retrying" not in said.err + said.out
