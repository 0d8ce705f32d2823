"""Writes the task's prompts: ``data/train.jsonl``, and ``data/eval.jsonl`` with other topics.

    python examples/smollm2/make_data.py

Short answers that name three things of a kind, give a reason and end with a question, without one word. Each criterion
has a ``check``, a regular expression for the metrics, which the judge never sees.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
TRAIN = {
    "fruits": "apple banana orange grape pear peach mango cherry plum lemon strawberry blueberry kiwi pineapple",
    "farm animals": "cow horse pig sheep goat chicken duck goose donkey turkey rabbit rooster",
    "colors": "red blue green yellow orange purple black white brown pink gray violet",
    "drinks": "water tea coffee milk juice lemonade soda cocoa smoothie cider",
    "vegetables": "carrot potato tomato onion cabbage broccoli spinach pea bean cucumber pepper lettuce kale",
    "musical instruments": "piano guitar violin drum flute trumpet cello harp clarinet saxophone banjo",
    "tools": "hammer saw drill wrench screwdriver pliers axe shovel knife ladder",
    "jobs": "teacher doctor nurse farmer lawyer engineer baker pilot chef artist writer scientist",
    "languages": "english french german spanish chinese japanese arabic russian italian portuguese hindi korean",
    "trees": "oak pine maple birch willow cedar elm ash beech spruce palm fir",
    "birds": "robin eagle owl sparrow crow pigeon duck swan hawk parrot penguin finch",
    "flowers": "rose tulip daisy lily sunflower orchid violet iris poppy lavender daffodil",
    "clothes": "shirt dress hat coat jacket sweater sock shoe scarf skirt glove pant jean",
    "hobbies": "reading painting cooking gardening hiking running dancing swimming photography knitting fishing writing",
}
EVAL = {
    "sports": "soccer football tennis basketball baseball swimming running golf hockey volleyball cycling rugby",
    "countries": "france germany spain italy japan china india brazil canada mexico egypt kenya australia",
    "metals": "iron gold silver copper aluminum steel lead tin zinc nickel platinum",
    "school subjects": "math history science english biology chemistry physics art music geography literature",
}
WORDINGS = ("Name three {kind} and tell me about them.", "Which {kind} do you like? Answer in two or three sentences.")


def three_of(words: str) -> str:
    """A pattern with three groups for three different ones of ``words``, as they are or in the plural."""
    word = rf"({'|'.join(words.split())})(?:s|es)?\b"
    return rf"(?is)\b{word}.*?\b(?!\1){word}.*?\b(?!\1|\2){word}"


def row(kind: str, words: str, number: int) -> dict:
    """One query in g2r's own format."""
    rubric = [
        {"criterion": f"names three {kind}", "weight": 4, "tags": ["three"], "check": three_of(words)},
        {"criterion": "ends with a question", "weight": 4, "tags": ["question"], "check": r"(\?)\s*$"},
        {
            "criterion": "gives a reason with the word because",
            "weight": 3,
            "tags": ["reason"],
            "check": r"(?i)\b(because)\b",
        },
        {"criterion": "uses the word very", "weight": -3, "tags": ["very"], "check": r"(?i)\b(very)\b"},
    ]
    return {"id": f"{kind}-{number}", "prompt": WORDINGS[number].format(kind=kind), "rubric": rubric}


def main() -> None:
    (HERE / "data").mkdir(exist_ok=True)
    for split, kinds in (("train", TRAIN), ("eval", EVAL)):
        rows = [row(kind, words, number) for kind, words in kinds.items() for number in range(len(WORDINGS))]
        path = HERE / "data" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} queries")


if __name__ == "__main__":
    main()
