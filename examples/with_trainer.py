"""transformers' Trainer trains an adapted model; its checkpoints hold the adapter without the base.

python examples/with_trainer.py [OUT]
"""

import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import graft
import graft.seedling
from graft.quickstart.problems import generate

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/with_trainer")
tokenizer = AutoTokenizer.from_pretrained(graft.seedling.path())
model = AutoModelForCausalLM.from_pretrained(graft.seedling.path())
graft.attach(model, {"math": graft.LoRA(rank=8, sites="linear")})

rows = [tokenizer(f"{row['instruction']} {row['output']}{tokenizer.eos_token}") for row in generate("train", 64)]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        str(out), max_steps=8, per_device_train_batch_size=8, learning_rate=2e-3, report_to=[], save_steps=8
    ),
    train_dataset=rows,  # pyright: ignore[reportArgumentType]
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()

checkpoint = out / "checkpoint-8"
print(sorted(path.name for path in checkpoint.iterdir()))
fresh = AutoModelForCausalLM.from_pretrained(graft.seedling.path())
graft.load(fresh, checkpoint, name="math")
print(graft.summary(fresh))
