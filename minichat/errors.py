"""The one exception for bad input: scripts print it as one line and exit with code 2."""


class BadInput(ValueError):
    """Something the caller gave is wrong: the message says the value seen, the rule, and what to do next."""
