"""infer.py's flags, prompts and output, and the conversation, without a terminal."""

import io
import json
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import make

from minichat import chat, converse
from minichat.cli import BASE
from minichat.errors import BadInput
from minichat.generation import Answer, Sampling
from minichat.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TOKENIZER = Tokenizer(BASE)


# ---- the conversation ----


def talk(answers, **changes) -> tuple[converse.Talk, list[list[int]]]:
    """A Talk that says `answers`, None being Ctrl-C, and the ids of every prompt that it is given."""
    flags = dict(max_length=None, max_new_tokens=8, template="neuralchat", system=None, stop=[], json=False)
    args = Namespace(**{**flags, "batch_size": 16, "kv_cache": "auto", **changes})
    model = make(vocab_size=TOKENIZER.vocab_size)
    model.scheme = None
    found = converse.Talk(args, model, TOKENIZER, Sampling())
    given, left = [], iter(answers)

    def answer(prompts, on_text=None):
        given.extend(prompts)
        for piece in next(left):
            if piece is None:
                raise KeyboardInterrupt
            on_text(0, piece)
        return [Answer("", [1], "stop", len(prompts[0]), 0.1, 0.2)]

    found.answer = answer
    return found, given


def ids_of(*texts) -> list[int]:
    """The prompt's ids of a conversation: what the user and the assistant say in turns."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return chat.prompt_ids(messages, "neuralchat", TOKENIZER)


@pytest.fixture
def ask(monkeypatch, capsys):
    """ask(talk, *lines) -> (stdout, stderr) of the conversation, its output redirected."""

    def call(found, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        found.conversation()
        return capsys.readouterr()

    return call


def test_a_full_context_forgets_each_turn_once(ask):
    turns = [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4"), ("five", "5")]
    room = max(len(ids_of("two", "2", "three")), len(ids_of("three", "3", "four")), len(ids_of("four", "4", "five")))
    found, given = talk([[answer] for _, answer in turns], max_length=room + 8)
    _, err = ask(found, *(line for line, _ in turns))
    assert given == [
        ids_of("one"),
        ids_of("one", "1", "two"),
        ids_of("two", "2", "three"),
        ids_of("three", "3", "four"),
        ids_of("four", "4", "five"),
    ]
    assert err.count("its oldest turn is forgotten") == 3


def test_a_line_that_has_no_room_alone_costs_no_history(ask):
    found, given = talk([["1"], ["2"]], max_length=200)
    _, err = ask(found, "one", "9 " * 200, "two")
    assert given == [ids_of("one"), ids_of("one", "1", "two")]
    assert err.count("error: the prompt has") == 1 and "forgotten" not in err


def test_ctrl_c_before_the_first_text_leaves_no_turn(ask):
    found, given = talk([["1"], [None], ["3", None], ["4"]])
    ask(found, "one", "two", "three", "four")
    assert given[1:] == [
        ids_of("one", "1", "two"),
        ids_of("one", "1", "three"),  # "two" has no answer: it is as if it had not been asked
        ids_of("one", "1", "three", "3", "four"),  # what was said before Ctrl-C stays
    ]


def test_an_answer_without_text_leaves_no_turn(ask):
    found, given = talk([[], ["2"]])
    ask(found, "one", "two")
    assert given == [ids_of("one"), ids_of("two")]


def test_redirected_output_is_answers_alone(ask):
    found, _ = talk([["1"], ["2", "3"]])
    out, err = ask(found, "one", "two")
    assert out == "1\n23\n"
    assert err.count("you> ") == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("where", ["a terminal", "a terminal without readline", "redirected"])
def test_lines_are_edited_where_there_is_a_terminal(monkeypatch, where):
    pytest.importorskip("readline")
    found, given = talk([["1"]])
    monkeypatch.delitem(sys.modules, "readline")  # pytest imports it
    if where == "a terminal without readline":
        monkeypatch.setitem(sys.modules, "readline", None)
    out = io.StringIO() if where == "redirected" else Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("one\n"))
    monkeypatch.setattr(sys, "stdout", out)
    found.conversation()
    assert given == [ids_of("one")]
    assert bool(sys.modules.get("readline")) == (where == "a terminal")
    assert out.getvalue() == ("1\n" if where == "redirected" else "you> 1\nyou> ")


# ---- prompts and flags ----


@pytest.fixture
def infer(base, tmp_path, monkeypatch, capfd):
    """infer(*flags, stdin="", encoding="utf-8") -> (exit code, stdout, stderr), in this process and in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, stdin="", encoding="utf-8", model=base):
        given = [] if model is None else ["--model", model]
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, [*given, "--max-new-tokens", 4, *flags])])
        if isinstance(stdin, bytes):
            stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
        code = 0
        try:
            runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        return code, out.getvalue().decode(encoding), capfd.readouterr().err

    return call


def error_of(result) -> str:
    code, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("minichat: ")]
    assert code == 2 and not out and len(lines) == 1 and lines[0].startswith("error: "), result
    return lines[0]


@pytest.mark.parametrize("json_flag", [(), ("--json",)], ids=["text", "json"])
def test_a_bad_prompt_among_many_is_named(infer, json_flag):
    long = "9 " * 600
    assert "prompt 2 of 3" in error_of(infer("--prompt", "a", "--prompt", long, "--prompt", "b", *json_flag))
    assert "prompt 2 of 2" in error_of(infer("--prompt", "a", "--prompt", " ", *json_flag))
    assert "prompt 2 of 2" in error_of(infer("--prompt", "a", "--prompt", "b \ud800", *json_flag))
    text = f"a\n\nb\n{long}\nc\n"  # empty lines are no prompts, and are counted
    Path("prompts.txt").write_text(text)
    assert error_of(infer("--file", "prompts.txt", *json_flag)).startswith("error: prompts.txt:4: ")
    assert error_of(infer(*json_flag, stdin=text)).startswith("error: standard input:4: ")
    assert error_of(infer("--file", "-", *json_flag, stdin=text)).startswith("error: standard input:4: ")


def test_a_line_that_is_not_utf8_is_named(infer):
    raw = "é\n\nb\n".encode() + b"\xff\nc\n"
    Path("prompts.txt").write_bytes(raw)
    assert error_of(infer("--file", "prompts.txt")).startswith("error: prompts.txt:4: not UTF-8")
    assert error_of(infer(stdin=raw)).startswith("error: standard input:4: not UTF-8")
    through = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", errors="surrogateescape")  # as in the C locale
    assert error_of(infer(stdin=through)).startswith("error: standard input:4: not UTF-8")


def test_a_prompt_beyond_the_models_vocabulary_is_named():
    """As with a tokenizer that has more tokens than the model."""
    found, _ = talk([], template="none")
    found.model = make(vocab_size=max(TOKENIZER.encode("5")) + 1)
    with pytest.raises(BadInput, match="^f:2: .*vocabulary"):
        found.answers([("f:1", "5"), ("f:2", "It")])


@pytest.mark.parametrize("stream, text", [("<&-", "standard input"), (">&-", "standard output")])
def test_a_closed_stream_is_one_line(stream, text):
    command = ["sh", "-c", f'exec "$@" {stream}', "sh", sys.executable, ROOT / "infer.py"]
    more = ["--prompt", "a"] if stream == ">&-" else []
    found = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
    assert found.stderr.startswith(f"error: {text} is closed")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_an_output_that_cannot_encode_loses_no_answer(infer, encoding):
    prompts = ["é", "你 🙂"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    shown = [prompt.encode(encoding, "backslashreplace").decode(encoding) for prompt in prompts]
    code, out, err = infer(*flags, encoding=encoding)
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("> ")] == [f"> {prompt}" for prompt in shown]
    code, out, err = infer(*flags, "--json", encoding=encoding)
    assert code == 0, err
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts
    assert ("你" in out) == (encoding == "utf-8")


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--bits", 8], ["--bits", "--int4"]),
        (["--group-size", 64], ["--group-size", "--int4"]),
        (["--asymmetric", "--bits", 8], ["--asymmetric", "--int4"]),
        (["--lm-head"], ["--lm-head", "--int4"]),
        (["--top-p", 0.9], ["--top-p", "--temperature"]),
        (["--top-k", 5, "--temperature", 0], ["--top-k", "--temperature"]),
        (["--min-p", 0.1], ["--min-p", "--temperature"]),
        (["--model", ""], ["--model", "''"]),
        (["--max-length", 0], ["--max-length is 0", "1 or more"]),
        (["--max-length", -5], ["--max-length is -5", "1 or more"]),
        (["--max-new-tokens", 0], ["--max-new-tokens is 0", "1 or more"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_flag_that_would_be_ignored_is_an_error(infer, flags, parts):
    error = error_of(infer("--prompt", "a", *flags))
    for part in parts:
        assert part in error


@pytest.mark.parametrize("flags", [["--json"], ["--batch-size", "4"]])
def test_flags_of_prompts_are_refused_in_a_conversation(monkeypatch, flags):
    import infer

    monkeypatch.setattr(sys, "argv", ["infer.py", *flags])
    monkeypatch.setattr(infer, "read_prompts", lambda args: None)  # on a terminal
    with pytest.raises(BadInput, match=f"{flags[0]} in a conversation"):
        infer.main()


def test_an_empty_file_name_is_an_error(infer):
    assert "--file is empty" in error_of(infer("--file", ""))


def test_flags_that_say_their_default_or_have_what_they_need(infer):
    for flags in (
        ["--bits", 4, "--group-size", 32, "--top-p", 1.0, "--top-k", 0, "--seed", 7],
        ["--int4", "--bits", 8, "--asymmetric"],
        ["--int4", "--lm-head"],
        ["--temperature", 0.7, "--top-p", 0.9, "--top-k", 5, "--min-p", 0.1],
        ["--max-length", 400],
    ):
        code, out, err = infer("--prompt", "a", *flags)
        assert code == 0 and out, err


def test_an_empty_system_message_is_one():
    """Not neuralchat's default, which stands where none is given."""
    with_default, given = talk([], system=None), talk([], system="")
    assert [m["role"] for m in with_default[0].messages("a")] == ["user"]
    assert [m["role"] for m in given[0].messages("a")] == ["system", "user"]
    assert given[0].ids(given[0].messages("a")) != ids_of("a")
