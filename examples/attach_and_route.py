"""Attach adapters, use them, route the rows of one batch to different adapters, merge and detach. The model stays itself.

python examples/attach_and_route.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graft
import graft.seedling

folder = graft.seedling.path()  # or any folder or hub name of a causal language model
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
batch = tokenizer(["Tom has 7 apples."] * 3, return_tensors="pt", return_token_type_ids=False)

with torch.no_grad():
    base = model(**batch).logits
    graft.attach(
        model,
        {
            "lora": graft.LoRA(rank=8, sites="attn.q attn.v"),
            "series": graft.Series(bottleneck=32, sites="attn mlp", init="bert"),
            "prefix": graft.Prefix(tokens=4, init_std=1.0),
        },
    )
    print(graft.summary(model))

    with graft.use(model, None):
        assert torch.equal(model(**batch).logits, base)  # switched off, the base is bitwise itself
    with graft.use(model, "series"):
        series = model(**batch).logits
    with graft.route(model, ["series", None, "prefix"]):  # one pass over the base, three kinds of rows
        mixed = model(**batch).logits
    print("row 0 is the series adapter:", torch.allclose(mixed[0], series[0], atol=1e-5))
    print("row 1 is the bare base:     ", torch.allclose(mixed[1], base[1], atol=1e-5))

    graft.merge(model, "lora")
    graft.unmerge(model, "lora")
    graft.detach(model)
    assert torch.equal(model(**batch).logits, base) and type(model).__name__ == "LlamaForCausalLM"
    print("after detach the model is what it was")
