"""Questions and answers to look at a model with where the run has no held-out rows: short, and of many kinds.

They are our own words. What is compared is how two models read them; whether the answers are good plays no part.
"""

from __future__ import annotations

import datetime
from typing import Any, NamedTuple

from qlora_cli.data.chat import Renderer
from qlora_cli.data.formats import Passage
from qlora_cli.errors import DataError


class Prompt(NamedTuple):
    """A question and an answer to it."""

    question: str
    answer: str


PROMPTS = (
    Prompt(
        "Why does the moon seem larger when it is near the horizon?",
        "It is an illusion. The image on the eye is as large as when the moon is high, but beside trees and houses we "
        "judge it to be farther away, and so larger.",
    ),
    Prompt(
        "A train leaves at 9:40 and arrives at 12:15. How long is the journey?",
        "From 9:40 to 12:00 it is 2 hours and 20 minutes, and 15 minutes more make 2 hours and 35 minutes.",
    ),
    Prompt(
        "Write a Python function that counts the vowels in a text.",
        "def count_vowels(text: str) -> int:\n"
        '    """How many letters of `text` are vowels."""\n'
        '    return sum(letter in "aeiou" for letter in text.lower())',
    ),
    Prompt(
        "Translate into French: The library closes at six, but the reading room stays open until nine.",
        "La bibliothèque ferme à six heures, mais la salle de lecture reste ouverte jusqu'à neuf heures.",
    ),
    Prompt(
        "How do I keep basil fresh for a week?",
        "Cut the ends of the stems, put them in a glass with a little water like flowers, and leave it at room "
        "temperature. Change the water every second day. In the fridge the leaves turn black.",
    ),
    Prompt(
        "Sum this up in one sentence: The bridge was shut on Monday after an inspector found cracks in two of its "
        "cables. Engineers will replace both, which takes about three weeks. Buses go by way of the tunnel meanwhile.",
        "The bridge is closed for about three weeks while two cracked cables are replaced, and buses take the tunnel.",
    ),
    Prompt(
        "Is this review positive or negative? The screen is lovely, but it broke after four days and nobody answers "
        "my letters.",
        "Negative: the writer likes the screen, but the device failed and the support did not reply.",
    ),
    Prompt(
        "Who painted the ceiling of the Sistine Chapel, and when?",
        "Michelangelo painted it between 1508 and 1512, for Pope Julius II.",
    ),
    Prompt(
        "Give me the name, the city and the age as JSON: Ada Brown, 41, has lived in Leeds since 2009.",
        '{"name": "Ada Brown", "city": "Leeds", "age": 41}',
    ),
    Prompt(
        "Solve for x: 3x + 7 = 25.",
        "Take 7 from both sides: 3x = 18. Divide by 3: x = 6.",
    ),
    Prompt(
        "Write two lines of verse about rain on a tin roof.",
        "The rain came drumming on the roof of tin,\nand half asleep we let the evening in.",
    ),
    Prompt(
        "What is the difference between a virus and a bacterium?",
        "A bacterium is a living cell that feeds and divides by itself. A virus is only genetic material in a shell, "
        "and needs the cells of others to multiply. Antibiotics work against bacteria, not against viruses.",
    ),
    Prompt(
        "Write an SQL query for the five customers with the highest total of orders.",
        "SELECT customer_id, SUM(total) AS spent\nFROM orders\nGROUP BY customer_id\nORDER BY spent DESC\nLIMIT 5;",
    ),
    Prompt(
        "My colleague keeps interrupting me in meetings. What can I say?",
        "Say it calmly and at once: 'Let me finish, please, then I would like to hear your view.' If it goes on, speak "
        "with them alone, name one occasion, and say what you would like instead.",
    ),
    Prompt(
        "Übersetze ins Englische: Morgen wird es kälter, nimm also lieber einen Mantel mit.",
        "It will be colder tomorrow, so you had better take a coat.",
    ),
    Prompt(
        "Correct the grammar: Her and me was going to the shop when it start to rain.",
        "She and I were going to the shop when it started to rain.",
    ),
    Prompt(
        "What does a notice period of three months to the end of a quarter mean?",
        "The contract ends on the last day of a quarter, and the notice has to arrive at least three months before "
        "that day. To leave at the end of June, it must be there by the end of March.",
    ),
    Prompt(
        "All roses are flowers. Some flowers fade quickly. Does it follow that some roses fade quickly?",
        "No. The flowers that fade quickly may all be of other kinds; nothing is said of the roses among them.",
    ),
    Prompt(
        "How far is light from the sun on its way when it reaches the earth?",
        "It has come about 150 million kilometres, and that took it a little over eight minutes.",
    ),
    Prompt(
        "List three things to check before a long drive.",
        "1. The pressure and the tread of the tyres.\n2. Oil, coolant and water for the windows.\n3. All the lights.",
    ),
    Prompt(
        "Explain recursion to a child.",
        "Think of a box with a smaller box in it, and a smaller one in that. To find the sweet you open a box, and if "
        "there is another one inside, you do the very same again, until a box has no box in it.",
    ),
    Prompt(
        "¿Cuál es la capital de Australia?",
        "La capital de Australia es Canberra, aunque mucha gente piensa que es Sídney.",
    ),
    Prompt(
        "What does this shell command do? find . -name '*.log' -mtime +30 -delete",
        "It deletes every file below the current folder whose name ends in .log and that was last changed more than "
        "30 days ago.",
    ),
    Prompt(
        "Why did many people leave the countryside for towns in nineteenth-century England?",
        "Factories in the towns paid wages, while enclosures and new machines left less work on the land. Railways "
        "made it easy to move.",
    ),
)


def encode_prompts(tokenizer: Any, today: datetime.date) -> list[list[int]]:
    """Token ids of every prompt with its answer.

    With the tokenizer's chat template where it has one that takes such a conversation; else the question, the answer on
    a line below it, and what special tokens the tokenizer puts around a text, with its end of sequence after it.
    """
    renderer = Renderer(tokenizer, "everything", today=today)
    return [_encode(tokenizer, renderer, prompt) for prompt in PROMPTS]


def _encode(tokenizer: Any, renderer: Renderer, prompt: Prompt) -> list[int]:
    bare = f"{prompt.question}\n"
    try:
        rendered = renderer.render(Passage(prompt.question, prompt.answer, bare), "a shipped prompt")[0]
    except DataError:
        text, plain = bare + prompt.answer, True
    else:
        text, plain = rendered.text, rendered.bare
    ids: list[int] = tokenizer(text, add_special_tokens=plain)["input_ids"]
    if plain and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids
