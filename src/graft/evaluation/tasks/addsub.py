"""AddSub: one-step additions and subtractions (Hosseini et al. 2014, EMNLP). 395 questions.

One raw row (AddSub.json):

    {"iIndex": 0, "sQuestion": "Joan found 70 seashells on the beach . ... How many seashells does she have now ?",
     "lEquations": ["X=(70.0-27.0)"], "lSolutions": [43.0], "lAlignments": [22, 67]}

The MAWPS training questions that LLM-Adapters trains on are near-copies of most of these.
"""

from graft.evaluation.tasks.word_problems import repository_set

TASK = repository_set("AddSub")
