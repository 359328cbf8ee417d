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
    """What went wrong with the hub, in a few words: what the system said, where it lies at the bottom of the error."""
    root = error
    while (below := root.__cause__ or root.__context__) is not None:
        root = below
    said = root.strerror if isinstance(root, OSError) and root.strerror else str(error) or type(error).__name__
    return textwrap.shorten(said, 200, placeholder=" …")
