"""The templates that come with Graft.

alpaca: the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca) with the line end after "### Response:" that
alpaca-lora added. A system message replaces the opening sentence; later turns repeat the two blocks with their headings.

llm-adapters: the text that finetune.py of LLM-Adapters (arXiv 2304.01933) trains on, including its indentation of 16 spaces, trailing
spaces and separator lines filled with spaces. That project evaluates with slightly different whitespace; Graft uses this form
for training and evaluation.

plain: prompt and completion with nothing added; a line end joins further turns.
"""

from __future__ import annotations

from graft.data.turn_template import TurnTemplate

_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."
_CONTEXT = ", paired with an input that provides further context"
_PAD = " " * 16

ALPACA = TurnTemplate(
    name="alpaca",
    opening=f"{_TASK}. {_WRITE}\n\n",
    opening_with_input=f"{_TASK}{_CONTEXT}. {_WRITE}\n\n",
    system="{system}\n\n",
    user="### Instruction:\n{user}\n\n### Response:\n",
    user_with_input="### Instruction:\n{user}\n\n### Input:\n{input}\n\n### Response:\n",
)

LLM_ADAPTERS = TurnTemplate(
    name="llm-adapters",
    opening=f"{_TASK}. {_WRITE}  \n\n",
    opening_with_input=f"{_TASK}{_CONTEXT}. {_WRITE} \n\n",
    system="{system}\n\n",
    user=f"{_PAD}### Instruction:\n{_PAD}{{user}}\n{_PAD}\n{_PAD}### Response:\n{_PAD}",
    user_with_input=(
        f"{_PAD}### Instruction:\n{_PAD}{{user}}\n{_PAD}\n{_PAD}### Input:\n{_PAD}{{input}}\n{_PAD}\n"
        f"{_PAD}### Response:\n{_PAD}"
    ),
)

PLAIN = TurnTemplate(name="plain", system="{system}\n", user="{user}", between="\n")

BUILTIN_TEMPLATES = {template.name: template for template in (ALPACA, LLM_ADAPTERS, PLAIN)}
