"""From a data file to batches of tokens: reading, templates, tokenising with masks, splits, cache, batches.

The way of a row: `reading` makes it a `Sample` (a conversation), a `Template` renders that to spans of text that know
whether the model is to learn them, `encoding` turns spans into token ids, `tokenizing` into an `Example` with a mask,
`preparing` collects examples into `TokenDataset`s with a report, and `batches` lays them out for the model.
"""
