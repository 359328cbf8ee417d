"""A refusal is one short line, whatever it shows."""

import pytest

from minichat.errors import BadInput


@pytest.mark.parametrize("odd", ["a\nb", "a\r\n\x0b\x0c\x1c\x85\u2028\u2029b", "\0\x1b[2J\x7f\x9b", "\ud83d"])
def test_what_is_no_character_of_a_line_is_escaped(odd):
    said = str(BadInput(f"x {odd} y"))
    assert len(said.splitlines()) == 1 and said.isprintable() and said.startswith("x ") and said.endswith(" y")
    assert str(BadInput(said)) == said


def test_a_message_is_as_it_was_said_or_shortened_in_the_middle():
    said = "é 😀 'a\\nb': mend it, or choose another"
    assert str(BadInput(said)) == said
    long = str(BadInput(f"/file.json: key is {'a' * 100_000!r}; mend it"))
    assert len(long) < 1200 and long.startswith("/file.json: key is 'aaa") and long.endswith("aaa'; mend it")
    assert len(str(BadInput("\0" * 100_000))) < 5000
