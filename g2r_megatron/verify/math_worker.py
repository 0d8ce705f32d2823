"""A process that compares mathematical answers with math-verify, one JSON line in, one out.

Not in the process that trains: sympy can compute for hours on a short text (9^{9^{9}}), out of reach of any signal. Who
started this process ends it when an answer takes too long.
"""

import json
import logging
import sys

from math_verify import parse, verify


def same(expected: str, found: str) -> bool:
    """Whether both texts are the same mathematical value."""
    gold, answer = (parse(f"${text}$", parsing_timeout=None, raise_on_error=False) for text in (expected, found))
    return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=False))


def main() -> None:
    """Answer until the input ends."""
    logging.disable(logging.WARNING)  # it warns that it has no time limit of its own
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(same(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
