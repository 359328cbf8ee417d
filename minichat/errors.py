"""The one exception for bad input: scripts print it as one line and exit with code 2."""

import re
import textwrap


class BadInput(ValueError):
    """Something the caller gave is wrong: the message says the value seen, the rule, and what to do next.

    One line of about 1,000 characters at most, whatever the value seen is: of a longer message the middle is left out,
    and control characters and halves of characters are escaped.
    """

    def __init__(self, message: str):
        message = message if len(message) <= 1000 else f"{message[:600]} … {message[-400:]}"
        unprintable = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
        super().__init__(re.sub(unprintable, lambda match: ascii(match[0])[1:-1], message))


def why(error: BaseException) -> str:
    """What the hub said, in a few words; of an error that only says it is not in reach, what lies below that."""
    if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")
