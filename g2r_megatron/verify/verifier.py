"""Whether the final answer of a response is right (``verifier.*``): the reward of rows with an answer."""

import json
import shutil
from importlib.util import find_spec

import regex

from g2r_megatron.config.options import VerifierConfig
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError
from g2r_megatron.verify.answers import final_answer, letter, plain
from g2r_megatron.verify.process import MathWorker, exit_code


class Verifier:
    """Compares responses with the ``answer`` of their rows."""

    def __init__(self, config: VerifierConfig):
        """Raises ``UserError`` for a command, or a package, that is not there."""
        self.config = config
        if config.kind == "math" and find_spec("math_verify") is None:
            raise UserError(
                "verifier.kind",
                "math, but the package math-verify is not installed",
                "pip install 'g2r-megatron[math]'",
            )
        if config.kind == "command" and shutil.which(config.command[0]) is None:
            raise UserError("verifier.command", f"no program {config.command[0]!r}", "give a program that can be run")
        self._math = MathWorker(config.timeout_seconds, config.memory_mib)

    def check(self, query: Query) -> None:
        """Raise ``UserError`` for an answer that no response could match."""
        if query.answer is None:
            return
        where = f"query {query.id!r}"
        if self.config.kind == "choice" and letter(final_answer(query.answer) or query.answer) is None:
            raise UserError(where, f"answer {query.answer!r} with verifier.kind choice", "it must be one letter")
        if self.config.kind == "regex":
            try:
                regex.compile(query.answer)
            except regex.error as error:
                raise UserError(
                    where, f"answer {query.answer!r} is no regular expression ({error})", "correct it"
                ) from error

    def right(self, query: Query, text: str) -> bool:
        """Whether the response ``text`` is right; what is too slow or too large to decide is wrong."""
        config, expected = self.config, query.answer
        assert expected is not None
        if config.kind == "command":
            asked = {"id": query.id, "messages": query.messages, "response": text, "answer": expected}
            return exit_code(config.command, json.dumps(asked), config.timeout_seconds, config.memory_mib) == 0
        found = final_answer(text)
        if found is None:
            return False
        if config.kind != "regex":
            expected = final_answer(expected) or expected  # an answer can be a worked solution that ends with ####
        if config.kind == "choice":
            return letter(found) == letter(expected)
        if config.kind == "regex":
            return _matches(expected, plain(found), config.timeout_seconds)
        if plain(found) == plain(expected):
            return True
        return config.kind == "math" and self._math.same(expected, found) is True

    def close(self) -> None:
        """End the process that it may have started."""
        self._math.close()


def _matches(pattern: str, text: str, timeout_seconds: float) -> bool:
    """Whether the whole ``text`` matches; one that takes longer does not."""
    try:
        return regex.fullmatch(pattern, text, timeout=timeout_seconds) is not None
    except TimeoutError:
        return False
