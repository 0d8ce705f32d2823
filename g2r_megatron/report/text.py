"""Text of models, users and files on a page: it can be read, and cannot act."""

import unicodedata
from html import escape


def visible(text: str) -> str:
    """Text of a model or a user as HTML that cannot act: escaped, control and direction characters made visible."""
    return escape(plain(text))


def plain(text: str) -> str:
    """``text`` with control and direction characters made visible."""
    return "".join(character if character in "\n\t" else _symbol(character) for character in text)


def _symbol(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 0x20 else "␡"
    return "\ufffd" if category in ("Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character != "\u200d" else character
