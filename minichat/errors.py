"""The one exception for bad input: scripts print it as one line and exit with code 2."""

import re


class BadInput(ValueError):
    """Something the caller gave is wrong: the message says the value seen, the rule, and what to do next.

    One line of at most 1200 characters, whatever the value seen is: control characters and halves of characters are
    escaped, and of a longer message the middle is left out.
    """

    def __init__(self, message: str):
        message = message if len(message) <= 1000 else f"{message[:600]} … {message[-400:]}"
        unprintable = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
        super().__init__(re.sub(unprintable, lambda match: ascii(match[0])[1:-1], message))
