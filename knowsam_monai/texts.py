"""Names that others chose, of files and classes, as what they are shown in can take them."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """
    The text in one line, without what no file, page or terminal can show.

    Args:
        text: any; control characters, line ends and what is no Unicode become the replacement character.

    Example:
        >>> printable("left\\nventricle")
        'left\ufffdventricle'
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_invisible(character) else character for character in text)


def shortened(text: str, length: int) -> str:
    """
    The printable text, its middle left out where it is longer.

    Args:
        text: any.
        length: most characters, 3 or more.

    Example:
        >>> shortened("patient001_frame01", 9)
        'pati…me01'
    """
    text = printable(text)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


def _is_invisible(character: str) -> bool:
    category = unicodedata.category(character)
    return category.startswith("C") or category in ("Zl", "Zp")
