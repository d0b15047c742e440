"""SingleEq: word problems that one equation solves (Koncel-Kedziorski et al. 2015, TACL 3). 508 questions.

One raw row (SingleEq.json):

    {"iIndex": 1, "sQuestion": "Sara's high school played 12 basketball games this year. ...", "lEquations": ["x=12-4"],
     "lSolutions": [8.0], "lAlignments": [[12], [4]]}

The MAWPS training questions that LLM-Adapters trains on are near-copies of most of these.
"""

from graft.evaluation.tasks.word_problems import repository_set

TASK = repository_set("SingleEq")
