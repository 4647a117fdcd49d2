"""Prompts of real text: of a length in tokens, or passages of a built-in text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Number of first tokens of a cut prompt that are drawn at random, so that prompts begin
#: differently and prefix caches miss.
FRESH = 3
#: Minimum and maximum words of a passage.
WORDS = (8, 96)
#: The text that passages are taken from.
TEXT = """\
Once upon a time there was a village between two hills. A river ran through it, and on the river
stood a mill. The miller had three daughters. The eldest could read the weather from the colour of
the water, the second knew every bird by its song, and the youngest asked questions all day long.
Why does the wheel turn only one way? Where does the river sleep in winter? Who counts the stones
when nobody looks? Her father had no answers, so he gave her a lantern and said: go and see. She
walked along the bank until the hills became mountains. There she met a shepherd who had lost his
way in the fog, and a merchant whose cart had a broken axle. She held the light for both of them.
The shepherd told her how snow turns into streams, and the merchant drew her a map of the roads to
the sea. At night they shared bread and cheese near a small fire, and an owl watched them from a
fallen tree. In the morning the fog was gone. Far below lay the village, and smoke rose from every
chimney. On her way home the girl wrote down all that she had heard, one line for each bend of the
road. The next spring a flood came. It took the old bridge and a part of the garden, but the mill
stayed dry, because she had asked the river where it would go. Since then people have come from
other valleys with questions of their own. Some of them are easy: how many loaves are made from one
sack of flour, or which day the ferry leaves. Others take a year. She writes each of them into a
long blue book, leaves an empty page behind it, and waits.
"""


class Texts:
    """Prompts of all servers, as tokens.

    Args:
        prompts: [server][prompt], the tokens of each prompt; no prompt is empty.
    """

    def __init__(self, prompts: Sequence[Sequence[list[int]]]) -> None:
        self._prompts = prompts
        self._tokens = [np.concatenate([np.array(p) for p in own]) for own in prompts]

    def whole(self, server: int, rng: np.random.Generator) -> list[int]:
        """Draw one of the server's prompts."""
        own = self._prompts[server]
        return own[int(rng.integers(len(own)))]

    def cut(self, server: int, length: int, rng: np.random.Generator) -> list[int]:
        """Draw `length` tokens from anywhere in the server's prompts; they wrap around at the end.

        The first FRESH tokens are drawn at random.
        """
        tokens = self._tokens[server]
        start = int(rng.integers(len(tokens)))
        found = tokens.take(range(start, start + length), mode="wrap")
        fresh = min(FRESH, length)
        found[:fresh] = rng.choice(tokens, fresh)
        return found.tolist()


def passage(rng: np.random.Generator) -> str:
    """Draw a passage of the built-in text from any word on; it wraps around at the end."""
    words = np.array(TEXT.split())
    start, length = int(rng.integers(len(words))), int(rng.integers(*WORDS, endpoint=True))
    return " ".join(words.take(range(start, start + length), mode="wrap"))
