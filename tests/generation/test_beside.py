"""The tokenizer and template that lie beside an adapter are the adapter's: its prompts are those of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.bases import Base, load_base
from graft.cli import main
from graft.config.base import BaseConfig
from graft.data.samples import Message
from graft.generation.loaded import load_candidates

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASKED: list[Message] = [{"role": "user", "content": "How many cats?"}]
BASE = BaseConfig(model="seedling")


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("seedling")


@pytest.fixture
def peft(base: Base, tmp_path: Path) -> Path:
    """A PEFT folder without anything beside it."""
    graft.attach(base.model, {"a": graft.LoRA(rank=2, sites="attn.q")})
    graft.export(base.model, "a", tmp_path / "a")
    graft.detach(base.model)
    return tmp_path / "a"


def prompt(folder: Path, **options: Any) -> str:
    loaded = load_candidates(base=BASE, adapters=[f"a={folder}"], **options)
    return loaded.base.tokenizer.decode(loaded.find("a").template.prompt_ids(ASKED, loaded.base.tokenizer))


def settings(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **fields}))


WANTED = "[user] How many cats?\n[assistant]"


def test_a_folder_as_trl_leaves_it_is_asked_with_its_own_template(base: Base, peft: Path) -> None:
    plain = prompt(peft)
    assert WANTED not in plain
    base.tokenizer.save_pretrained(peft)
    (peft / "chat_template.jinja").write_text(CHAT)
    assert WANTED in prompt(peft)
    assert prompt(peft, template="plain").strip().endswith("How many cats?")  # only where it is asked for
    loaded = load_candidates(base=BASE, adapters=[f"a={peft}"])
    assert loaded.find("a").template_file == "chat_template.jinja"
    assert loaded.find("base").template == loaded.find("a").template


@pytest.mark.parametrize("several", [False, True])
def test_a_template_in_the_settings_of_a_tokenizer_counts_too(several: bool, peft: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT}]
    settings(peft, chat_template=named if several else CHAT)
    assert WANTED in prompt(peft)
    settings(peft, chat_template=named[:1])
    with pytest.raises(graft.GraftError, match="none of them 'default'"):
        prompt(peft)


def test_the_marks_of_the_folder_end_answers(base: Base, peft: Path) -> None:
    other = next(
        token for token in sorted(base.tokenizer.get_vocab()) if token not in base.tokenizer.all_special_tokens
    )
    settings(peft, chat_template=CHAT, eos_token={"content": other})
    loaded = load_candidates(base=BASE, adapters=[f"a={peft}"])
    assert base.tokenizer.convert_tokens_to_ids(other) in loaded.find("a").template.stop_ids(loaded.base.tokenizer)
    settings(peft, eos_token="<|nowhere|>")
    with pytest.raises(graft.GraftError, match="eos_token is '<|nowhere|>'"):
        prompt(peft)


def test_adapters_with_different_tokenizers_are_not_asked_side_by_side(base: Base, peft: Path, tmp_path: Path) -> None:
    base.tokenizer.save_pretrained(peft)
    graft.attach(base.model, {"b": graft.LoRA(rank=2, sites="attn.q")})
    graft.save(base.model, "b", tmp_path / "b")
    graft.detach(base.model)
    both = [f"a={peft}", f"b={tmp_path / 'b'}"]
    assert len(load_candidates(base=BASE, adapters=both).adapters) == 2  # the tokenizer is the base's own
    other = next(
        token for token in sorted(base.tokenizer.get_vocab()) if token not in base.tokenizer.all_special_tokens
    )
    settings(peft, eos_token=other)
    with pytest.raises(graft.GraftError, match="load them one at a time"):
        load_candidates(base=BASE, adapters=both)


def test_import_takes_template_and_tokenizer_along(
    base: Base, peft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base.tokenizer.save_pretrained(peft)
    (peft / "chat_template.jinja").write_text(CHAT)
    try:
        main(["import", str(peft), "--base", "seedling", "--to", str(tmp_path / "own")])
    except SystemExit as end:
        assert not end.code
    assert "template: chat_template.jinja" in capsys.readouterr().out
    assert prompt(tmp_path / "own") == prompt(peft)


def test_a_template_that_graft_saved_comes_first(base: Base, peft: Path) -> None:
    from graft.data.templates import template_of

    (peft / "chat_template.jinja").write_text(CHAT)
    template_of("plain").save(peft)
    assert WANTED not in prompt(peft)
