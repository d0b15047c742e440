"""What an output states as its answer: a number or the label of a choice, as people and models write them.

- `plain` turns LaTeX, Markdown and Unicode into plain text.
- `thoughts` leaves out what the model thought before its answer.
- `statements` leaves out questions that the model asks itself, and finds boxes and phrases that state an answer.
- `numerals` finds the numbers in plain text.
- `numbers` and `choices` put these together.

Whatever could be read in two ways is no answer: to count a wrong answer as right is worse than the reverse.
"""
