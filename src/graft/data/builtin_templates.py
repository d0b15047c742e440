"""The templates that come with Graft.

alpaca: the prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca) with the line end after "### Response:" that
alpaca-lora added. A system message takes the place of the opening sentence; later turns repeat the two headed blocks.

llm-adapters: what finetune.py of LLM-Adapters (arXiv 2304.01933) trains on, its indentation of 16 spaces, trailing
spaces and space-filled separator lines included. That project evaluates on slightly different whitespace; here training
and evaluation use this one form.

plain: prompt and completion with nothing added; further turns are joined by a line end.
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
