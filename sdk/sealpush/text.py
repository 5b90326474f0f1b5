"""What a text shows to a person: nothing, what it says, or something else. Pure.

A name with characters that nobody sees could pose as another name; a title made of them is no title. Which characters those are is said by
Unicode's properties: control and format characters, surrogates and unassigned ones (category C), separators (Z), and what a font draws as
nothing although it counts as a letter, a mark or a symbol.
"""

import unicodedata
from typing import Final

# Default_Ignorable_Code_Point of Unicode 17 (DerivedCoreProperties.txt) outside category C, which Python's database does not tell; and the
# blank pattern of Braille, which is a symbol and shows nothing either.
_DRAWN_AS_NOTHING: Final = frozenset(
    [
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, 0x2800),
        *range(0x180B, 0x180E),
        0x180F,
        *range(0xFE00, 0xFE10),
        *range(0xE0100, 0xE01F0),
    ]
)


def is_invisible(character: str) -> bool:
    """Whether a character shows nothing by itself: blanks included."""
    return ord(character) in _DRAWN_AS_NOTHING or unicodedata.category(character)[0] in "CZ"


def shows_something(text: str) -> bool:
    """Whether a person sees anything of a text."""
    return not all(map(is_invisible, text))


def shows_as_written(text: str) -> bool:
    """Whether a text is what it seems to be: in normal form C, and no invisible characters in it but spaces between others."""
    if text != text.strip(" ") or not unicodedata.is_normalized("NFC", text):
        return False
    return not any(character != " " and is_invisible(character) for character in text)
