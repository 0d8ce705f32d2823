"""The task: add four numbers, a step a line. Prompts, right solutions, and solutions as an unsure writer makes them."""

import hashlib
import random

TERMS, LARGEST = 4, 9
CRITERION = "right"  # what the judge is asked: verifier.criterion in config.yaml


def sample_terms(rng: random.Random, count: int = TERMS) -> tuple[int, ...]:
    return tuple(rng.randint(1, LARGEST) for _ in range(count))


def is_held_out(terms: tuple[int, ...]) -> bool:
    """A tenth of all prompts, by their hash: neither model nor policy is trained on them."""
    return hashlib.sha256(repr(terms).encode()).digest()[0] % 10 == 0


def prompt(terms: tuple[int, ...]) -> str:
    return " ".join(["add", *map(str, terms)])


def is_hard(total: int, term: int) -> bool:
    """A third of all sums, which the writer gets wrong more often than not."""
    return hashlib.sha256(f"{total}+{term}".encode()).digest()[0] % 3 == 0


def solution(terms: tuple[int, ...], rng: random.Random, mistakes: float = 1.0) -> tuple[str, bool]:
    """A solution and whether its final answer is right. ``mistakes``: factor on how often a sum is one too many."""
    total, lines = terms[0], []
    for term in terms[1:]:
        wrong = rng.random() < mistakes * (0.6 if is_hard(total, term) else 0.08)
        lines.append(f" {total} + {term} = {total + term + wrong}")
        total += term + wrong
    return "\n".join([*lines, f" #### {total}"]), total == sum(terms)


def words() -> list[str]:
    """Every word of prompts, solutions and the judge's question, each with its space."""
    return ["add", "+", "=", "####", "|", "=>", "True", "False", *CRITERION.split(), *map(str, range(51))]
