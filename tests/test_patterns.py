"""Regular expressions of other people: those in use are Python's, and none takes forever."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minichat.errors import BadInput
from minichat.patterns import compiled

NAME = "model.layers.31.self_attn.q_proj_and_more"
USED = [
    r"model\.layers\.[0-3]\..*_proj",
    r".*layers\.(\d+)\..*_proj",
    "(.*\\.)?((q_proj|k_proj|v_proj))$",
    r"model\.layers\.(0|1|2|3|4|5|6|7|8|9|1\d|31)\.(self_attn|mlp)\.[^.]+",
    r"(?!.*(up|down)).*self_attn.*",
]
HOSTILE = [
    r"(\w+\.?)+!",
    "(a|.)*!",
    "(.?){40}!",
    ".?" * 30 + "!",
    "(.|.)" * 30 + "!",
    ".*.*.*.*.*.*.*.*!",
    "(?=(.*.*)*!)",
    "(?:(?:.*)?)*!",
    "(" * 2000 + ")" * 2000,
]
# atoms, put after one another, in groups, in alternatives and repeated
patterns = st.recursive(
    st.sampled_from([".", "a", r"\w", r"\.", "[a-z]", "model", "_", "!"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda several: f"({'|'.join(several)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2,}", "{0,30}", "{7}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("pattern", USED)
def test_those_in_use_are_pythons(pattern):
    assert compiled(pattern) == re.compile(pattern)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_those_that_would_take_forever_are_refused(pattern):
    with pytest.raises(BadInput, match="too many ways"):
        compiled(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(?x)(.+) +!", "(?x:(.+) +!)", "(?x)#[\n(.+)+!#]", "(?#[)(.+)+!(?#])", "(?i)q_proj", "(?-i:a)", "(?ix)a"],
)
def test_flags_and_comments_which_could_hide_a_repeat_are_refused(pattern):
    with pytest.raises(BadInput, match="flags or comments"):
        compiled(pattern)


@pytest.mark.parametrize("pattern", ["(", "(?P<a", "a{99999999999}"])
def test_those_that_are_none_are_refused(pattern):
    with pytest.raises(BadInput, match="no regular expression"):
        compiled(pattern)


@given(patterns)
@settings(deadline=None, max_examples=200)
def test_what_is_not_refused_ends(pattern):
    try:
        found = compiled(pattern)
    except BadInput:
        return
    started = time.process_time()
    found.match(NAME)
    assert time.process_time() - started < 2


def test_the_limits():
    """Four repeats and six groups; those that are escaped, or in brackets, are none."""
    for most in ("a*b+c?d{2}", "(a)" * 6, r"[*+?{(]*\*\+\?\{\(" * 4):
        assert compiled(most) == re.compile(most)
    for more in ("a*b+c?d{2}e*", "(a)" * 7):
        with pytest.raises(BadInput, match="too many ways"):
            compiled(more)
