"""Make names of files, classes and tensors safe and short enough to show in a message, file, page or terminal."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterable


def command_line(words: Iterable[str]) -> str:
    """
    The words as one command for a shell, lists of names in the quotes that people write.

    Args:
        words: the program and its arguments.

    Example:
        >>> print(command_line(["knowsam", "train", "acdc", "--class_names", "['liver', 'tumor']"]))
        knowsam train acdc --class_names "['liver', 'tumor']"
    """
    return " ".join(map(_quoted, words))


def printable(text: str) -> str:
    """
    The text in one line, without invisible characters.

    Args:
        text: any text; control characters, line breaks and invalid Unicode become the replacement character.

    Example:
        >>> printable("left\\nventricle")
        'left\ufffdventricle'
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_invisible(character) else character for character in text)


def shortened(text: str, length: int) -> str:
    """
    The printable text; if it is too long, an ellipsis replaces its middle.

    Args:
        text: any text.
        length: maximum number of characters, 3 or more.

    Example:
        >>> shortened("patient001_frame01", 9)
        'pati…me01'
    """
    text = printable(text)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


def some(names: Iterable[object], limit: int = 3) -> str:
    """
    The first names and the number of the others.

    Example:
        >>> some(["a", "b", "c", "d"])
        '`a`, `b`, `c` and 1 more'
    """
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + rest or "nothing"


def _is_invisible(character: str) -> bool:
    category = unicodedata.category(character)
    return category.startswith("C") or category in ("Zl", "Zp")


def _quoted(word: str) -> str:
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
