"""Text of models, users and files on a page. The page shows it; the browser never treats it as markup."""

import unicodedata
from html import escape


def visible(text: str) -> str:
    """``text`` as HTML: escaped, and with symbols in the place of control and direction characters."""
    return escape(plain(text))


def plain(text: str) -> str:
    """``text`` with symbols in the place of control and direction characters."""
    return "".join(character if character in "\n\t" else _symbol(character) for character in text)


def _symbol(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 0x20 else "␡"
    return "\ufffd" if category in ("Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character != "\u200d" else character
