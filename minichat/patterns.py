"""Regular expressions that come with models, for names of modules: refused where they could take forever."""

import functools
import re

from minichat.errors import BadInput

REPEATS, GROUPS = 4, 6  # matching takes time with a power of the first; those in use have up to three of each


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern:
    """The expression. Raises BadInput if it is none, if it repeats a group, or has many repeats or groups."""
    if re.search(r"\(\?[aiLmsux#-]", pattern):  # x and # would hide a repeat from what follows
        raise BadInput(f"{pattern!r:.200} has flags or comments; write it without")
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern, flags=re.DOTALL)
    repeats = re.findall(r"(?<!\()[*+?{]", bare)
    if re.search(r"\)[*+{]", bare) or len(repeats) > REPEATS or bare.count("(") > GROUPS:
        raise BadInput(f"{pattern!r:.200} could be matched in too many ways; repeat less, and no groups")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(f"{pattern!r:.200} is no regular expression: {error}") from None
