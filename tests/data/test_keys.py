"""Every key of a row and of a message is used, handed to the chat template, or named."""

from __future__ import annotations

import json

import pytest

from graft.config.data import DataConfig, SourceConfig
from graft.data.inspect import coloured
from graft.data.preparing import prepare
from graft.data.reading import read
from graft.data.templates import template_of
from graft.errors import GraftError

JINJA = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.thinking %}{{ '(' + m.thinking + ') ' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %} CALL {{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def handed(tokenizer, tmp_path):
    """Prepare rows under a template that writes tools, calls and thoughts; return texts with the targets in [[ ]]."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = JINJA

    def prepared(*rows, template="chat", **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"path": str(path), **settings.pop("source", {})}
        config = DataConfig.model_validate(
            {"train": source, "template": template, "cache": False, "max_length": 4000, **settings}
        )
        done = prepare(config, tokenizer)
        prepared.report = done.report
        return [marked(example, tokenizer) for example in done.train]

    return prepared


def marked(example, tokenizer):
    text = coloured(example, tokenizer, marks=True).plain.replace("⟦", "[[").replace("⟧", "]]")
    text = (
        text.removeprefix("<s>")
        .lstrip(" ")
        .replace("<|im_start|> ", "<|im_start|>")
        .replace("<|im_end|> ", "<|im_end|>")
    )
    return text.replace("]] \n", "]]\n").replace("<|im_start|>", "<").replace("<|im_end|>", ">")


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [TOOLS[0]["function"]]], ids=["list", "text", "bare"])
def test_tools_are_handed_to_the_template(handed, tools, tokenizer):
    (found,) = handed({"tools": tools, "messages": [user("time?"), answer("noon")]})
    assert '"name":"clock"' in found.replace(" ", "") and found.replace(" ", "").endswith("<assistant\n[[noon>]]")
    messages = [{**user("time?"), "tools": TOOLS}]
    theirs = tokenizer.apply_chat_template([user("time?")], tools=TOOLS, add_generation_prompt=True)["input_ids"]
    ours = template_of("chat", tokenizer).prompt_ids(messages, tokenizer)
    assert tokenizer.decode(ours, skip_special_tokens=True) == tokenizer.decode(theirs, skip_special_tokens=True)


@pytest.mark.parametrize(
    "turn",
    [
        answer("", tool_calls=CALLS),
        answer(None, tool_calls=json.dumps(CALLS)),
        answer(None, tool_calls=[{"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]),
        answer(None, function_call={"name": "clock", "arguments": '{"zone": "UTC"}'}),
    ],
    ids=["mapping", "text", "text arguments", "function_call"],
)
def test_calls_are_trained_on_and_their_results_are_not(handed, turn):
    rows = [{"messages": [user("time?"), turn, {"role": "tool", "content": "noon"}, answer("It is noon.")]}]
    (found,) = handed(*rows)
    assert '<assistant\n[[ CALL clock({"zone": "UTC"})>]]\n<tool\nnoon>\n<assistant\n[[It is noon.>]]' in _spaced(found)


def _spaced(text):
    return text.replace('":"', '": "')


def test_sharegpt_calls_and_observations(handed):
    turns = [
        {"from": "human", "value": "time?"},
        {"from": "function_call", "value": json.dumps({"name": "clock", "arguments": {"zone": "UTC"}})},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "It is noon."},
    ]
    (found,) = handed({"conversations": turns})
    assert "[[ CALL clock(" in found and "<tool\nnoon>" in found and found.endswith("[[It is noon.>]]")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_get_the_name_that_the_template_reads(handed, name):
    (found,) = handed({"messages": [user("2+2?"), answer("4", **{name: "two twos"})]})
    assert found.endswith("<assistant\n[[(two twos) 4>]]")


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("tools", {"tools": TOOLS, "messages": [user("a"), answer("b")]}),
        ("tool_calls", {"messages": [user("a"), answer("b", tool_calls=CALLS)]}),
        ("reasoning_content", {"messages": [user("a"), answer("b", reasoning_content="c")]}),
        ("tools", {"tools": TOOLS, "instruction": "a", "output": "b"}),
        ("role", {"messages": [user("a"), {"role": "tool", "content": "c"}, answer("b")]}),
    ],
)
def test_what_a_template_does_not_write_is_refused(handed, chatty, key, row, tmp_path):
    drops = tmp_path / "drops.jinja"
    drops.write_text(
        "{% for m in messages %}{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for template in (str(drops), "plain", "alpaca"):
        with pytest.raises(GraftError, match=rf"row 1: .*{key}"):
            handed(row, template=template)
    assert handed({**row, "messages": [user("a"), answer("b")]}, template=str(drops), source={"ignore": ["tools"]})


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"trainable": 0}])
def test_a_masked_answer_is_read_and_not_trained_on(handed, mark):
    (found,) = handed({"messages": [user("2+2?"), answer("5", **mark), user("no"), answer("4", weight=1)]})
    assert "<assistant\n5>\n<user\nno>\n<assistant\n[[4>]]" in found
    (found,) = handed({"messages": [user("a"), answer("5", **mark), user("no"), answer("4")]}, train_on="all")
    assert "]]5>" in found and found.endswith("4>\n]]")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_row_weights_and_masks_reach_the_mask(handed, template):
    talk = [user("a"), answer("b"), user("c"), answer("d")]
    assert len(handed({"messages": talk}, {"messages": talk, "weight": 0}, template=template)) == 1
    assert handed.report.train.masked == 1
    assert handed({"messages": talk, "loss_mask": [0, 0, 0, 1]}, template=template) == handed(
        {"messages": [user("a"), answer("b", weight=0), *talk[2:]]}, template=template
    )
    rows = [{"prompt": "a", "completion": "b", "train": word} for word in ("true", "False", "0", "1")]
    assert len(handed(*rows)) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [user("a"), answer("b", weight=0.5)]}, r"messages\[1\].weight': must be 0 or 1"),
        ({"messages": [{**user("a"), "train": True}, answer("b")]}, "asks to train on a message of role 'user'"),
        ({"messages": [user("a"), answer("b")], "loss_mask": [1]}, "one entry for each of the 2 turns"),
        ({"messages": [user("a"), answer("b")], "weight": 2}, "'weight': must be 0 or 1"),
        (
            {"messages": [{"role": "system", "content": "x"}, user("a"), answer("b")], "system": "y"},
            "'system': differs",
        ),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history': must be a list of pairs"),
        ({"prompt": "a", "completion": "b", "label": False}, "nothing reads the column 'label'.*kto"),
        ({"messages": [user("a"), answer("b")], "images": ["cat.png"]}, "nothing reads the column 'images'"),
        ({"messages": [user("a"), answer("b", tool_calls=[3])]}, "must be a call"),
        ({"messages": [user("a"), answer("b", loss_mask=[0, 1])]}, r"messages\[1\].loss_mask': changes what this turn"),
        (
            {"messages": [{**user("a"), "images": ["x.png"]}, answer("b")]},
            r"messages\[0\].images': changes what this turn",
        ),
        ({"prompt": "a", "completion": "b", "kto_tag": True}, "nothing reads the column 'kto_tag'"),
        ({"prompt": "a", "completion": "b", "sample_weight": 0.3}, "nothing reads the column 'sample_weight'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_row(handed, row, said):
    with pytest.raises(GraftError, match=f"row 1,? ?.*{said}|row 1: {said}"):
        handed(row)


def test_system_history_and_passages_are_read(handed):
    (found,) = handed({"system": "Be brief.", "messages": [user("a"), answer("b")]})
    assert found.startswith("<system\nBe brief.>")
    (found,) = handed({"system_prompt": "Be brief.", "question": "a", "response": "x", "answer": "b"})
    assert found.startswith("<system\nBe brief.>")
    (found,) = handed({"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]})
    assert "<user\na>\n<assistant\n[[b>]]\n<user\nc>\n<assistant\n[[d>]]" in found
    assert handed({"instruction": "c", "output": "d", "history": [user("a"), answer("b")]}) == [found]
    (found,) = handed({"question": "who won?", "context": "Ann beat Bob.", "answer": "Ann"}, template="alpaca")
    assert "### Input:\nAnn beat Bob." in found


def test_a_system_column_stands_before_pairs_of_conversations(tmp_path):
    row = {"system": "s", "chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("c")]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (sample,) = read(str(tmp_path / "a.json"), task="preference")
    assert sample.messages[0] == sample.rejected[0] == {"role": "system", "content": "s"}
    assert sample.asked == 2


def test_columns_that_nothing_reads_are_named(handed):
    row = {
        "messages": [{**user("a"), "id": 7}, answer("b")],
        "source": "web",
        "category": "qa",
        "empty": None,
        "none": [],
    }
    handed(row)
    assert any(
        "Nothing reads category, messages[].id of" in note.replace("source, ", "") for note in handed.report.notes
    )
    handed(row, source={"ignore": ["source", "category", "messages[].id"]})
    assert not handed.report.unread


def test_messages_may_be_json_text(tmp_path):
    talk = [user("a"), answer("b")]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": json.dumps(talk)}]))
    assert list(read(str(tmp_path / "a.json"))[0].messages) == talk


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"prompt": "smile \ud83d now", "completion": "ok"}, "causal"),
        ({"prompt": "a", "completion": "b \udc00"}, "causal"),
        ({"messages": [user("\ud800"), answer("b")]}, "causal"),
        ({"messages": [user("a"), answer("b", tool_calls=[{"function": {"name": "f", "arguments": {"x": "\ud800"}}}])]}, "causal"),
        ({"tools": [{"name": "\ud800"}], "messages": [user("a"), answer("b")]}, "causal"),
        ({"prompt": "a", "chosen": "b", "rejected": "\ud83d"}, "preference"),
        ({"text": "a \ud83d", "label": "x"}, "classification"),
        ({"text": "a", "label": "\ud83d"}, "classification"),
    ],
)  # fmt: skip
def test_half_of_a_character_is_named_with_its_row(tmp_path, row, task):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(GraftError, match=r"row 1, field '.*': holds half of a character"):
        read(SourceConfig(path=str(path)), task=task)
