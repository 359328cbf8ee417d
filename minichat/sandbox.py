"""What chat templates make of conversations. Those that come with models are untrusted, and run in another process.

Jinja's own sandbox keeps them from Python's insides, not from using up time and memory. That process may take a second
of processor time for a text and, on Linux, a GiB of memory in all.
"""

import atexit
import functools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minichat.errors import BadInput, brief

_CPU_SECONDS = 1.0
_MEMORY = 1 << 30  # bytes
_ADDED = 1 << 18  # characters of a text beside what is said in it, which may come 16 times: tokenising takes longer
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")

Span = tuple[int, int]  # character offsets


def short(template: str) -> str:
    """A template as an error shows it."""
    return repr(template if len(template) <= 60 else template[:57] + "…")


def text(messages: list[dict], template: str, tokens: dict[str, str], add_generation_prompt: bool, ours: bool) -> str:
    """The text that a template makes of messages. tokens: bos_token and so on; ours: the template is trusted.

    Raises BadInput, whatever the template does.
    """
    arguments = messages, template, tokens, add_generation_prompt
    return _text(*arguments)[0] if ours else _elsewhere("text", arguments)[0]


def layout(
    messages: list[dict], template: str, tokens: dict[str, str], add_generation_prompt: bool, ours: bool
) -> tuple[str, list[Span] | None, list[int]]:
    """That text, the spans in it that the assistant says, None if that cannot be told, and the character offsets where
    tokenisation is cut: the ends of each span and of each prompt, ascending."""
    arguments = messages, template, tokens, add_generation_prompt
    if ours:  # these end a prompt where the span of its answer begins
        text, spans = _text(*arguments)
        return text, spans, sorted({cut for span in spans for cut in span})
    return _elsewhere("layout", arguments)


def _layout(
    messages: list[dict], template: str, tokens: dict[str, str], add_generation_prompt: bool
) -> tuple[str, list[Span] | None, list[int]]:
    text, spans = _text(messages, template, tokens, add_generation_prompt)
    # A prompt's own cuts, and none but those, may come before its end: a span that begins inside it is cut off there.
    tagged = _GENERATION_TAG.search(template) is not None
    cuts: set[int] = set()
    found: list[Span] = []
    whole = True
    asked = 0  # where the latest prompt ends
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:  # there is no prompt to be the beginning of anything
            whole = whole and tagged
            continue
        prompt, inner = _text(messages[:i], template, tokens, True)
        if not text.startswith(prompt):
            whole = False
            continue
        cuts.update(cut for span in inner for cut in span if cut > asked)
        asked = len(prompt)
        cuts.add(asked)
        if tagged:
            continue
        is_all = i == len(messages) - 1 and not add_generation_prompt
        longer = text if is_all else _text(messages[: i + 1], template, tokens, False)[0]
        if not (longer.startswith(prompt) and text.startswith(longer)):
            whole = False
            continue
        end = asked + len(_said(longer[asked:], message["content"]))
        cuts.add(end)
        found.append((asked, end))
    cuts.update(cut for span in spans for cut in span if cut > asked)
    return text, (spans if tagged else found) if whole else None, sorted(cuts)


def _said(answer: str, content: str) -> str:
    """An answer as a template without generation tags writes it, up to its end token."""
    trimmed = answer.rstrip()
    content = content.rstrip()
    # where nothing but white space follows the content, white space is the only end there is to learn
    return answer if not trimmed or content and trimmed.endswith(content) else trimmed


def _text(
    messages: list[dict], template: str, tokens: dict[str, str], add_generation_prompt: bool
) -> tuple[str, list[Span]]:
    """The text that a template makes of messages, and the spans inside its generation tags."""
    variables = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    if _limited:
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)  # whose signal ends the process, whatever that is at
    try:
        marked = _compiled(template).render(**variables, **tokens)
    except Exception as error:
        raise _failed(template, error) from error
    finally:
        if _limited:
            signal.setitimer(signal.ITIMER_PROF, 0)
    most = _ADDED + 16 * sum(len(message["content"]) for message in messages)
    if len(marked) > most:
        raise _failed(template, f"it makes a text of {len(marked)} characters; of these messages {most} are the most")
    first, *rest = marked.split(_OPEN)
    parts, spans, length = [first], [], len(first)
    for part in rest:
        said, close, after = part.partition(_CLOSE)
        parts += [said, after]
        if not close:
            raise BadInput(f"chat template {short(template)} has generation tags inside others; close each one first")
        spans.append((length, length + len(said)))
        length += len(said) + len(after)
    text = "".join(parts)
    if _CLOSE in text:
        raise BadInput(f"chat template {short(template)} takes its generation tags apart; let them enclose output")
    return text, spans


def _failed(template: str, error: Exception | str) -> BadInput:
    why = error if isinstance(error, str) else brief(error)
    if isinstance(error, MemoryError):
        why = f"it takes more than {_MEMORY >> 20} MiB"
    line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return BadInput(f"chat template {short(template)} failed{line}: {why}; mend it, or choose a built-in --template")


# ---- the other process ----

_PATH = [str(Path(__file__).resolve().parents[1]), *map(os.path.abspath, sys.path)]  # as it is now: folders may change
_READY = b"ready\n"
_lock = threading.Lock()
_process: subprocess.Popen | None = None
_limited = False  # whether this is it


def _elsewhere(what: str, arguments: tuple):
    """What _serve() answers in the other process, which is begun where there is none."""
    global _process
    with _lock:
        if _process is None or _process.poll() is not None:
            _end()
            _process = _begun()
        try:
            _process.stdin.write(json.dumps([what, arguments]).encode() + b"\n")
            _process.stdin.flush()
            line = _process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # Ctrl-C: the next one would get this one's answer
            _end()
            raise
        ended = None if line.endswith(b"\n") else _end()
    if ended is not None:
        late = ended == -signal.SIGPROF
        why = f"it runs longer than {_CPU_SECONDS:g} s" if late else f"its process ended with {ended}"
        raise _failed(arguments[1], why)
    answer, error = json.loads(line)
    if error is not None:
        raise BadInput(error)
    return answer


def _begun() -> subprocess.Popen:
    program = "import sys; sys.path[:] = sys.argv[1:]; from minichat.sandbox import _serve; _serve()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # in a session of its own, no Ctrl-C of the terminal reaches it
    process = subprocess.Popen([sys.executable, "-I", "-c", program, *_PATH], **pipes, start_new_session=True)
    try:
        if process.stdout.readline() != _READY:
            raise OSError(f"{sys.executable} did not start for a chat template")
    except BaseException:
        process.kill()
        with process:
            raise
    return process


@atexit.register
def _end() -> int:
    """End the other process, if there is one; its exit status."""
    global _process
    process, _process = _process, None
    if process is None:
        return 0
    process.kill()  # it keeps nothing
    with suppress(BrokenPipeError), process:
        pass
    return process.returncode


def _after_fork() -> None:
    """A process that was forked off takes one of its own: answers of its parent's would be taken for each other's."""
    global _lock, _process, _parents
    _lock, _process, _parents = threading.Lock(), None, _process


os.register_at_fork(after_in_child=_after_fork)


def _serve() -> None:
    """Answer each line, [what, arguments], by one: [answer, None], or [None, what is wrong]."""
    import resource

    global _limited
    _limited, last = True, None
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whoever began this may not want it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    with suppress(ValueError, OSError):  # not on macOS
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    answer = _READY.decode()
    while True:
        try:
            sys.stdout.write(answer)
            sys.stdout.flush()
        except BrokenPipeError:
            os._exit(0)  # nobody waits for it
        if not (line := sys.stdin.buffer.readline()):
            return
        try:
            what, arguments = json.loads(line)
            if arguments[1] != last:  # what is left of another template counts for none
                last = arguments[1]
                _compiled.cache_clear()
            found = {"text": _text, "layout": _layout}[what](*arguments)
            answer = json.dumps([found, None]) + "\n"
        except BadInput as error:
            answer = json.dumps([None, str(error)]) + "\n"
        except MemoryError:
            answer = json.dumps([None, f"a conversation takes more than {_MEMORY >> 20} MiB to lay out"]) + "\n"


# ---- Jinja as transformers sets it up ----

# methods that templates have use for: what is not there cannot be a way out
_STR = (
    "strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith removeprefix removesuffix "
    "upper lower title capitalize casefold swapcase find rfind index rindex count replace join "
    "isdigit isdecimal isnumeric isalpha isalnum isspace isupper islower istitle"
)
_METHODS = ((str, _STR), (dict, "get items keys values"), ((list, tuple), "index count"))

# Content cannot forge these: they are drawn anew in every process.
_OPEN, _CLOSE = (f"\ue000{secrets.token_hex(16)}\ue001" for _ in range(2))


class _Sandbox(ImmutableSandboxedEnvironment):
    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, methods in _METHODS:
            if isinstance(obj, kind):
                return attr in methods.split()
        return type(obj).__module__.startswith("jinja2.")


class _Generation(Extension):
    """{% generation %}…{% endgeneration %}: marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_OPEN, _CLOSE)]
        return [marks[0], nodes.Scope(body).set_lineno(line), marks[1]]  # a scope, as it is in transformers


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment
