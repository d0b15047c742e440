"""From a data file to batches of tokens: reading, templates, tokenisation with masks, splits, cache, batches.

A row passes through these steps:

    reading      turns the row into a `Sample`, that is a conversation
    template     renders the conversation as spans of text; each span knows whether the model learns it
    encoding     turns the spans into token ids
    tokenizing   adds the mask and yields an `Example` (`labelling`, `pairs` and `seq2seq` do this for the other tasks)
    preparing    collects the examples into `TokenDataset`s and writes a report
    batches      lays the examples out as tensors for the model
"""
