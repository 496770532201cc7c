"""What words of a command line mean: whole numbers, settings, places in a clip."""

import argparse
import ast

__all__ = ["count", "pairs", "place"]


def count(text: str) -> int:
    """The whole number, 1 or more, that a word says."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def pairs(texts: list[str]) -> dict:
    """{"epochs": 3} from ["epochs=3"]; a value that is no Python literal is taken as text.

    Raises ValueError for a word that is no NAME=VALUE.
    """
    words = {"true": True, "false": False}
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"{text!r} is not of the form NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = words.get(value, value)
    return found


def place(text: str) -> tuple[int, int, int]:
    """(8, 20, 28) from "8,20,28"."""
    try:
        step, row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not STEP,ROW,COLUMN: three whole numbers") from None
    return step, row, column
