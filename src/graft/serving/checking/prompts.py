"""The prompts of the check: short, unlike one another, with words, numbers, code and other scripts, so that some meet any adapter."""

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "What is 17 plus 25? Think step by step and give the number.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Once upon a time there was a gardener who grafted an apple",
    "Ein Baum hat Wurzeln, einen Stamm und viele Zweige.",
    "If x = 3 and y = 4, then x * y + 2 equals",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Question: Who wrote Hamlet?\nAnswer:",
    '{"name": "Ada", "born": 1815, "field":',
    "It was the best of times, it was the worst of",
    "Translate to French: good morning, dear friends.",
    "A train leaves at 9:40 and arrives at 11:15. It takes",
    "SELECT name, price FROM fruit WHERE price < 3 ORDER BY",
    "The opposite of hot is cold, and the opposite of early is",
    "Señor Núñez añade azúcar al café a las ocho.",
    "- wash the pot\n- fill it with soil\n- plant the",
)
PROBE = "Trees grow from seeds, and seeds from"
"""The prompt that finds out what a server can be asked; none of the others, so that no cache knows them yet."""
