"""The one exception for bad input: scripts print it as one line and exit with code 2."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class BadInput(ValueError):
    """Something the caller gave is wrong: the message says the value seen, the rule, and what to do next.

    One line of about 1,000 characters at most, whatever the value seen is: of a longer message the middle is left out,
    and control characters and halves of characters are escaped.
    """

    def __init__(self, message: str):
        message = message if len(message) <= 1000 else f"{message[:600]} … {message[-400:]}"
        unprintable = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
        super().__init__(re.sub(unprintable, lambda match: ascii(match[0])[1:-1], message))


@contextmanager
def within(where: object) -> Iterator[None]:
    """What is wrong inside, with `where` before it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def brief(error: BaseException) -> str:
    """What an error of another library says, for a part of one line; its kind where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:200]} …"


def why(error: BaseException) -> str:
    """What went wrong with the hub, in a few words: what the system said, where it lies at the bottom of the error."""
    root = error
    while (below := root.__cause__ or root.__context__) is not None:
        root = below
    return root.strerror if isinstance(root, OSError) and root.strerror else brief(error)
