"""Templates against strings written by hand from the published sources."""

from __future__ import annotations

import json

import pytest

from graft.data.templates import template_of
from graft.errors import GraftError


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def text(spans):
    """The rendered text, with <EOS> where a template asks for the end-of-sequence token."""
    return "".join(span.text + ("<EOS>" if span.ends else "") for span in spans)


def learnt(spans):
    return "".join(span.text + ("<EOS>" if span.ends else "") for span in spans if span.supervised)


ADD = user("Add 2 and 3.")
FIVE = assistant("5")


def test_alpaca_is_the_published_prompt():
    assert text(template_of("alpaca").render([ADD, FIVE])) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Add 2 and 3.\n"
        "\n"
        "### Response:\n"
        "5<EOS>"
    )


def test_alpaca_with_an_input_is_the_published_prompt():
    assert text(template_of("alpaca").render([user("Add.", input="2 and 3"), FIVE])) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Add.\n"
        "\n"
        "### Input:\n"
        "2 and 3\n"
        "\n"
        "### Response:\n"
        "5<EOS>"
    )


def test_alpaca_puts_a_system_message_in_place_of_its_opening():
    rendered = text(template_of("alpaca").render([system("Be brief."), user("Add.", input="2 and 3"), FIVE]))
    assert rendered == "Be brief.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n5<EOS>"


def test_alpaca_repeats_its_blocks_in_later_turns():
    rendered = text(template_of("alpaca").render([system("S"), ADD, FIVE, user("And 1?"), assistant("6")]))
    assert rendered == (
        "S\n\n### Instruction:\nAdd 2 and 3.\n\n### Response:\n5<EOS>\n\n### Instruction:\nAnd 1?\n\n### Response:\n6<EOS>"
    )


def test_llm_adapters_is_the_literal_training_form_of_its_repository():
    # finetune.py:337-343 at commit 8166572
    assert text(template_of("llm-adapters").render([ADD, FIVE])) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        "\n"
        "                ### Instruction:\n"
        "                Add 2 and 3.\n"
        "                \n"
        "                ### Response:\n"
        "                5<EOS>"
    )


def test_llm_adapters_with_an_input_is_the_literal_training_form_of_its_repository():
    # finetune.py:325-335 at commit 8166572
    assert text(template_of("llm-adapters").render([user("Add.", input="2 and 3"), FIVE])) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. \n"
        "\n"
        "                ### Instruction:\n"
        "                Add.\n"
        "                \n"
        "                ### Input:\n"
        "                2 and 3\n"
        "                \n"
        "                ### Response:\n"
        "                5<EOS>"
    )


def test_plain_adds_nothing_but_line_ends_between_turns():
    conversation = [system("S"), user("2 + 3 ="), assistant(" 5"), user("+ 1 ="), assistant(" 6")]
    assert text(template_of("plain").render(conversation)) == "S\n2 + 3 = 5<EOS>\n+ 1 = 6<EOS>"


@pytest.mark.parametrize("name", ["alpaca", "llm-adapters", "plain"])
def test_every_answer_with_its_end_is_supervised_and_nothing_else(name):
    spans = template_of(name).render([user("a", input="b"), assistant("c"), user("d"), assistant("e")])
    assert learnt(spans) == "c<EOS>e<EOS>"


@pytest.mark.parametrize("name", ["alpaca", "llm-adapters", "plain"])
def test_a_prompt_is_what_stands_before_the_answer(name):
    template = template_of(name)
    conversation = [user("a", input="b"), assistant("c"), user("d"), assistant("e")]
    assert text(template.render(conversation)) == (
        text(template.render(conversation[:3], add_generation_prompt=True)) + "e<EOS>"
    )


def test_braces_and_placeholders_in_the_data_stay_as_they_are():
    rendered = text(template_of("plain").render([user("{user} {x} {{y}} {input}"), assistant("{system}")]))
    assert rendered == "{user} {x} {{y}} {input}{system}<EOS>"


def test_a_text_alone_needs_no_question_under_plain_and_is_refused_elsewhere():
    assert learnt(template_of("plain").render([assistant("Once.")])) == "Once.<EOS>"
    with pytest.raises(GraftError, match="an answer without a question"):
        template_of("alpaca").render([assistant("Once.")])


def test_a_default_system_prompt_yields_to_one_in_the_data():
    template = template_of("plain").with_system("Default.")
    assert text(template.render([ADD, FIVE])).startswith("Default.\n")
    assert text(template.render([system("Own."), ADD, FIVE])).startswith("Own.\n")


def test_turns_that_do_not_alternate_are_refused():
    with pytest.raises(GraftError, match=r"message 2 \('user'\) is out of turn"):
        template_of("alpaca").render([ADD, ADD, FIVE])
    with pytest.raises(GraftError, match=r"message 3 \('system'\) is out of turn"):
        template_of("alpaca").render([ADD, FIVE, system("late")])


def test_a_prompt_that_ends_with_an_answer_is_refused():
    with pytest.raises(GraftError, match="ends with an answer"):
        template_of("alpaca").render([ADD, FIVE], add_generation_prompt=True)


def test_a_file_of_turns_is_a_template(tmp_path):
    file = tmp_path / "quiz.yaml"
    file.write_text('opening: "Quiz.\\n"\nuser: "Q: {user}\\nA: "\nbetween: "\\n--\\n"\nsystem: "[{system}] "\n')
    template = template_of(file)
    assert template.name == "quiz"
    assert text(template.render([ADD, FIVE, ADD, FIVE])) == (
        "Quiz.\nQ: Add 2 and 3.\nA: 5<EOS>\n--\nQ: Add 2 and 3.\nA: 5<EOS>"
    )
    assert text(template.render([system("s"), user("a", input="b"), FIVE])) == "[s] Q: a\n\nb\nA: 5<EOS>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("usr: '{user}'", "unknown key 'usr'.*Did you mean 'user'"),
        ("opening: hello", "the key 'user' is missing"),
        ("user: hello", "'user' must hold {user} once, but holds none"),
        ("user: '{user}{user}'", "'user' must hold {user} once, but holds user, user"),
        ("user: 3", "'user' must be text, but is int"),
        ("- user", "a template is a mapping"),
        ("user: '{user}'\nsystem: 'x'", "'system' must hold {system} once"),
        ("user: [", "cannot be read"),
    ],
)
def test_a_bad_template_file_is_an_error_that_says_what_is_wrong(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(GraftError, match=message):
        template_of(file)


def test_a_template_without_a_place_for_a_system_message_refuses_one(tmp_path):
    file = tmp_path / "bare.json"
    file.write_text(json.dumps({"user": "{user}:"}))
    with pytest.raises(GraftError, match="no place for a system message"):
        template_of(file).render([system("s"), ADD, FIVE])


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(GraftError, match="unknown template 'alpacca'.*Did you mean 'alpaca'"):
        template_of("alpacca")
    with pytest.raises(GraftError, match="there is no such file"):
        template_of("missing.yaml")


@pytest.mark.parametrize("name", ["alpaca", "llm-adapters", "plain"])
def test_a_saved_template_loads_with_an_equal_digest(tmp_path, name):
    template = template_of(name).with_system("Be kind.")
    template.save(tmp_path)
    loaded = template_of(tmp_path)
    assert loaded == template
    assert loaded.digest == template.digest != template_of(name).digest
    assert template_of(tmp_path / "template.json") == template


def test_a_saved_template_that_was_changed_is_refused(tmp_path):
    template_of("alpaca").save(tmp_path)
    file = tmp_path / "template.json"
    file.write_text(file.read_text().replace("### Response:", "### Answer:"))
    with pytest.raises(GraftError, match="was changed after"):
        template_of(tmp_path)


def test_a_folder_without_a_template_is_refused(tmp_path):
    with pytest.raises(GraftError, match="holds no template"):
        template_of(tmp_path)


def test_digests_tell_templates_apart():
    assert len({template_of(name).digest for name in ("alpaca", "llm-adapters", "plain")}) == 3
