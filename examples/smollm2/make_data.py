"""Writes the task's prompts: ``data/train.jsonl``, and ``data/eval.jsonl`` with other topics.

    python examples/smollm2/make_data.py

Very short stories. The prompt names a topic alone; what earns points, the policy learns from its judge. Each criterion has a
``check``, a regular expression: the judge's tuning and the metrics read it, training never does.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
PROMPT = "Write a very short story about a {topic}."
TRAIN = (
    "garden house beach kitchen forest market station mountain library river farm street hospital bridge school "
    "baker teacher king child tree lamp letter clock bicycle island castle boat train"
)
EVAL = "lake village farmer window painter road lighthouse sailor"
COLORS = "red blue green yellow orange purple black white brown pink gray grey gold golden silver violet crimson"
SOUNDS = (
    "sounds? hear(?:s|d|ing)? listen\\w* nois\\w+ loud\\w* whisper\\w* rustl\\w+ chirp\\w* songs? sing(?:s|ing)? sang music\\w* "
    "melod\\w+ echo\\w* silen\\w+ quiet\\w* murmur\\w* hum(?:s|med|ming)? roar\\w* voices? laugh\\w* cr(?:y|ied|ying) bark\\w* "
    "ring(?:s|ing)? rang buzz\\w*"
)
WEATHER = (
    "sun(?:ny|light|shine|lit|set|rise)? rain\\w* wind(?:s|y|swept)? snow\\w* storm\\w* cloud\\w* breez\\w+ fog\\w* mist\\w* "
    "sky skies moon\\w* stars? weather"
)
ANIMALS = (
    "animals? birds? dogs? cats? cows? horses? bees? butterfl(?:y|ies) squirrels? fish deer rabbits? insects? mouse mice "
    "wol(?:f|ves) fox(?:es)? bears? owls? sheep goats? pigs? frogs? ducks? crows? spiders? pupp(?:y|ies) kittens?"
)
RUBRIC = (  # criterion, weight, tag, check
    ("mentions a color", 3, "color", COLORS),
    ("mentions something that can be heard", 3, "sound", SOUNDS),
    ("mentions the weather or the sky", 2, "weather", WEATHER),
    ("mentions an animal", 2, "animal", ANIMALS),
)


def any_of(words: str) -> str:
    """A pattern for one of ``words``, in upper or lower case."""
    return rf"(?i)\b(?:{'|'.join(words.split())})\b"


def row(topic: str) -> dict:
    """One query in g2r's own format."""
    rubric = [
        {"criterion": criterion, "weight": weight, "tags": [tag], "check": any_of(words)}
        for criterion, weight, tag, words in RUBRIC
    ]
    return {"id": topic, "prompt": PROMPT.format(topic=topic), "rubric": rubric}


def main() -> None:
    (HERE / "data").mkdir(exist_ok=True)
    for split, topics in (("train", TRAIN), ("eval", EVAL)):
        rows = [row(topic) for topic in topics.split()]
        path = HERE / "data" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} queries")


if __name__ == "__main__":
    main()
