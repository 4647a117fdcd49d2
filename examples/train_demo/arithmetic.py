"""Arithmetic in words and figures: sums, comparisons, series and word problems."""

import random

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jonas",
    "Kim",
    "Lena",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
]
THINGS = [
    "apples",
    "books",
    "coins",
    "cards",
    "pencils",
    "stones",
    "tickets",
    "eggs",
    "stamps",
    "shells",
    "bottles",
]
PLACES = [
    "at the market",
    "in a drawer",
    "from a friend",
    "on Monday",
    "in the garden",
    "at school",
]


def number(rng: random.Random, digits: int | None = None) -> int:
    """Draw a number of `digits` digits or, if None, of one to four, mostly few."""
    digits = digits or rng.choices([1, 2, 3, 4], [4, 6, 3, 1])[0]
    return rng.randrange(10**digits)


def calculation(rng: random.Random) -> tuple[str, str, str]:
    """Make an exercise: (expression in figures, the same in words, answer)."""
    kind = rng.choice("+-*/%")
    if kind == "+":
        a, b = number(rng), number(rng)
        return f"{a} + {b}", rng.choice([f"{a} plus {b}", f"the sum of {a} and {b}"]), str(a + b)
    if kind == "-":
        a, b = sorted((number(rng), number(rng)), reverse=True)
        return f"{a} - {b}", rng.choice([f"{a} minus {b}", f"{b} less than {a}"]), str(a - b)
    if kind == "*":
        a, b = number(rng, rng.choice([1, 2])), number(rng, rng.choice([1, 1, 2]))
        words = rng.choice([f"{a} times {b}", f"the product of {a} and {b}"])
        return f"{a} * {b}", words, str(a * b)
    b, quotient = rng.randrange(2, 13), number(rng, rng.choice([1, 2]))
    if kind == "/":
        return f"{b * quotient} / {b}", f"{b * quotient} divided by {b}", str(quotient)
    a = b * quotient + rng.randrange(b)
    return f"{a} % {b}", f"the remainder of {a} divided by {b}", str(a % b)


def comparison(rng: random.Random) -> tuple[str, str]:
    """Make a question about the order of two or more numbers, and its answer."""
    digits = rng.choice([1, 2, 3])
    a, b = number(rng, digits), number(rng, digits)
    kind = rng.randrange(3)
    if kind == 0:
        return f"Is {a} greater than {b}?", "Yes" if a > b else "No"
    if kind == 1:
        return f"Which is smaller, {a} or {b}?", str(min(a, b))
    values = [number(rng, digits) for _ in range(rng.randrange(3, 6))]
    return f"Sort these numbers: {', '.join(map(str, values))}.", ", ".join(
        map(str, sorted(values))
    )


def series(rng: random.Random) -> tuple[str, str]:
    """Make a question for the next number of an arithmetic or doubling series, and its answer."""
    start, step = number(rng, rng.choice([1, 2])), rng.randrange(1, 13)
    values = [start + step * i for i in range(6)]
    if rng.random() < 0.2:
        values = [(start + 1) * 2**i for i in range(6)]
    return f"What comes next: {', '.join(map(str, values[:-1]))}?", str(values[-1])


def word_problem(rng: random.Random) -> tuple[str, str]:
    """Make a short story that asks for a number, and its answer."""
    name, other = rng.sample(NAMES, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    a, b = rng.randrange(2, 100), rng.randrange(2, 40)
    kind = rng.randrange(5)
    if kind == 0:
        question = f"{name} has {a} {thing} and finds {b} more {place}."
        return f"{question} How many {thing} does {name} have now?", str(a + b)
    if kind == 1:
        question = f"{name} has {a + b} {thing} and gives {b} of them to {other}."
        return f"{question} How many {thing} are left?", str(a)
    if kind == 2:
        a = rng.randrange(2, 13)
        question = f"There are {a} boxes with {b} {thing} each."
        return f"{question} How many {thing} are there in all?", str(a * b)
    if kind == 3:
        count = rng.randrange(2, 10)
        question = f"{name} shares {count * b} {thing} equally among {count} friends."
        return f"{question} How many {thing} does each friend get?", str(b)
    question = f"{name} has {a} {thing}. {other} has {b} more than {name}."
    return f"{question} How many {thing} do they have together?", str(2 * a + b)


def document(rng: random.Random) -> str:
    """Make a document: a page of exercises in one style, or questions and answers in chat form."""
    style = rng.choice(
        ["equation", "equation", "words", "sentence", "story", "compare", "series", "mixed", "chat"]
    )
    makers = {"story": [word_problem], "compare": [comparison], "series": [series]}

    def exercise() -> tuple[str, str]:
        if style in makers:
            return makers[style][0](rng)
        if style in ("mixed", "chat") and rng.random() < 0.5:
            return rng.choice([word_problem, comparison, series])(rng)
        figures, words, answer = calculation(rng)
        asked = figures if rng.random() < 0.5 else words
        return f"What is {asked}?", answer

    if style == "equation":
        lines = [calculation(rng) for _ in range(rng.randrange(8, 40))]
        return "\n".join(f"{figures} = {answer}" for figures, _, answer in lines)
    if style == "sentence":
        lines = [calculation(rng) for _ in range(rng.randrange(5, 25))]
        return "\n".join(f"{words[0].upper()}{words[1:]} is {a}." for _, words, a in lines)
    if style == "chat":
        turns = [exercise() for _ in range(rng.choice([1, 1, 2, 3]))]
        return "\n".join(f"User: {q}\nAssistant: {a}" for q, a in turns)
    first, second = rng.choice([("", " "), ("Q: ", "\nA: "), ("Question: ", "\nAnswer: ")])
    pairs = [exercise() for _ in range(rng.randrange(4, 20))]
    return "\n".join(f"{first}{q}{second}{a}" for q, a in pairs)
