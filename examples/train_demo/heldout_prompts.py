"""Write prompts from held-out text: <domain>.fit.jsonl and <domain>.heldout.jsonl, disjoint.

The files have one {"task", "id", "prompt"} per line; the id names the source. The model was not
trained on these texts, and no document has prompts in both files.
"""

import argparse
import json
import random
from pathlib import Path

from tokenizer import DOMAINS

SHORTEST, LONGEST = 300, 600  # characters


def excerpt(text: str, rng: random.Random) -> str | None:
    """Cut some whole lines of SHORTEST to LONGEST characters, or the start of a longer line.

    Returns:
        None if the text from the randomly chosen line on is too short.
    """
    lines = text.split("\n")
    first = rng.randrange(len(lines))
    taken = ""
    for line in lines[first:]:
        if len(taken) + len(line) > LONGEST:
            break
        taken += line + "\n"
    if len(taken) < SHORTEST:
        taken += "\n".join(lines[first:])[len(taken) :][: LONGEST - len(taken)].rsplit(" ", 1)[0]
    taken = taken.strip("\n")
    return taken if SHORTEST <= len(taken) <= LONGEST else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the prompts to")
    parser.add_argument("--count", type=int, default=40, help="prompts per file")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for domain in DOMAINS:
        rows = (args.work / "corpus" / f"{domain}.heldout.jsonl").read_text().splitlines()
        documents = [json.loads(row) for row in rows]
        rng.shuffle(documents)
        half = len(documents) // 2
        for part, chosen in (("fit", documents[:half]), ("heldout", documents[half:])):
            lines: list[str] = []
            for number in range(50 * args.count):
                document = chosen[number % half]
                prompt = excerpt(document["text"], rng)
                if prompt is None or len(lines) == args.count:
                    continue
                name = f"{domain}-{part}-{len(lines)}: {document['source']}"
                row = {"task": domain, "id": name, "prompt": prompt}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            (args.out / f"{domain}.{part}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
