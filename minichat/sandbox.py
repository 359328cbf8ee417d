"""Jinja for chat templates, which come with models and are untrusted.

Jinja's own sandbox keeps them from Python's insides, not from using up memory and time. So everything that makes a
value or repeats something is metered: it spends what it makes, and looks at the clock. What makes much from little and
is not needed in a chat template (format, center, …) is not there. What remains: a few hundred MB at worst, and single
operations on a few MB between two looks at the clock.
"""

import functools
import json
import math
import re
import secrets
import threading
import time
from collections.abc import MappingView
from datetime import datetime
from types import BuiltinMethodType

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from minichat.errors import BadInput, brief

_CPU_SECONDS = 1.0
_BUDGET = 1 << 26  # characters and list items that one rendering may make
_LARGEST = 1 << 22  # weight of one value, with all that is in it
_ADDED = 1 << 18  # characters of a text beside what is said in it, which may come 16 times: tokenising takes longer
_DEEPEST = 32  # lists in lists
_LONGEST_INT = 4096  # bits
_LONGEST_TEMPLATE = 100_000  # characters; those in use have up to about 30,000

_STR = (
    "strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith removeprefix removesuffix "
    "upper lower title capitalize casefold swapcase find rfind index rindex count replace join "
    "isdigit isdecimal isnumeric isalpha isalnum isspace isupper islower istitle"
)
_METHODS = ((str, _STR), (dict, "get items keys values"), ((list, tuple), "index count"))
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float indent int items join last length list lower map "
    "max min reject rejectattr replace reverse safe select selectattr sort string title trim truncate unique upper "
    "wordcount"
)
_SIZED = (str, list, tuple, dict, MappingView, range)
# what they make, or the time that they take, is up to a product: strip and rfind compare all of one text at each
# character of another
_AMPLIFIERS = ("replace", "join", "indent", "tojson", "strip", "lstrip", "rstrip", "trim")
_AMPLIFIERS += ("rsplit", "rfind", "rindex", "rpartition")

# Content cannot forge these: they are drawn anew in every process.
_OPEN, _CLOSE = (f"\ue000{secrets.token_hex(16)}\ue001" for _ in range(2))

_meter = threading.local()


def short(template: str) -> str:
    """A template as an error shows it."""
    return repr(template if len(template) <= 60 else template[:57] + "…")


class _TooMuch(Exception):
    """A template uses more than it may."""


def render(template: str, variables: dict, metered: bool) -> tuple[str, list[tuple[int, int]]]:
    """The text that a chat template makes, and the spans of it inside generation tags, as character offsets.

    metered: the template is not ours. Raises BadInput, whatever the template does.
    """
    compiled = _compile(template, metered)
    try:
        _start_meter(metered)
        marked = compiled.render(tools=None, documents=None, **variables)
        most = _ADDED + 16 * sum(len(message["content"]) for message in variables["messages"])
        if metered and len(marked) > most:
            raise _TooMuch(f"it makes a text of {len(marked)} characters; of these messages {most} are the most")
    except Exception as error:
        raise _bad(template, error) from error
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


@functools.lru_cache(maxsize=64)
def _compile(template: str, metered: bool) -> jinja2.Template:
    if len(template) > _LONGEST_TEMPLATE:
        raise BadInput(
            f"chat template {short(template)} has {len(template)} characters; at most {_LONGEST_TEMPLATE} are read; "
            "choose a built-in --template"
        )
    try:
        _start_meter(True)  # constants are folded while compiling
        environment = _environment()
        tree = environment.parse(template)
        if metered:
            tree = _Metering().visit(tree)
            tree.set_environment(environment)
        return environment.from_string(tree)
    except Exception as error:
        raise _bad(template, error) from error


def _bad(template: str, error: Exception) -> BadInput:
    line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return BadInput(
        f"chat template {short(template)} failed{line}: {brief(error)}; mend it, or choose a built-in --template"
    )


def _start_meter(metered: bool) -> None:
    _meter.left = _BUDGET if metered else math.inf
    _meter.ticks = 0
    # processor time: a suspended machine is no reason to fail
    _meter.deadline = time.thread_time() + _CPU_SECONDS if metered else math.inf


def _spend(amount: int) -> None:
    _meter.left -= amount + 1
    _meter.ticks += 1
    if _meter.left < 0:
        raise _TooMuch(f"it makes more than {_BUDGET} characters")
    # on some machines reading the clock takes longer than all that is metered
    if _meter.ticks % 32 == 0 and _meter.deadline < math.inf and time.thread_time() > _meter.deadline:
        raise _TooMuch(f"it runs longer than {_CPU_SECONDS:g} s")


def _weigh(value: object, depth: int = 0) -> int:
    """What printing or comparing a value costs, however often it holds the same one: about its characters as JSON."""
    if isinstance(value, str):
        weight = 4 + len(value)
    elif isinstance(value, int):
        weight = 4 + value.bit_length() // 8
        if value.bit_length() > _LONGEST_INT:
            raise _TooMuch(f"it makes a number of more than {_LONGEST_INT} bits")
    elif isinstance(value, range):  # of numbers that fit a word
        weight = 16 + 8 * len(value)
    elif isinstance(value, _SIZED):
        if depth == _DEEPEST:
            raise _TooMuch(f"it nests lists more than {_DEEPEST} deep")
        weight = 16
        for item in value.items() if isinstance(value, dict) else value:
            weight += _weigh(item, depth + 1)
            if weight > _LARGEST:
                break
    else:
        weight = 4
    if weight > _LARGEST:
        raise _TooMuch(f"it makes a value of more than {_LARGEST} characters")
    return weight


def _made(value: object) -> object:
    """A new value, checked and paid for: what is in it was paid for when it was made."""
    _weigh(value)
    _spend(len(value) if isinstance(value, _SIZED) else 1)
    return value


def _amplifies(name: str, value: object, arguments: list) -> None:
    """Pay for a product beforehand: what replace, join and indent make is at most one argument for each character, and
    strip and rfind may look at all of their argument at each."""
    for one in (value, *arguments):
        if hasattr(type(one), "__iter__") and not isinstance(one, (*_SIZED, jinja2.Undefined)):
            raise _TooMuch(f"it joins a {type(one).__name__}: nobody knows how much that holds")
    each = sum(abs(a) if isinstance(a, int) else _weigh(a) for a in arguments)
    _spend(_weigh(value) * (1 + each * (_DEEPEST if name == "tojson" else 1)))


def _metered(name: str, function):
    """A filter or test that pays. One that would give its items one by one gives a list, so that it can be paid for."""

    @functools.wraps(function)  # with the mark that makes Jinja pass the environment first
    def paying(*args, **kwargs):
        _spend(0)
        if name in _AMPLIFIERS:
            value, *rest = args[1:] if hasattr(function, "jinja_pass_arg") else args
            _amplifies(name, value, [*rest, *kwargs.values()])
        result = function(*args, **kwargs)
        if hasattr(result, "__next__"):
            items = []
            for item in result:
                _spend(1)
                items.append(item)
            result = items
        return _made(result)

    return paying


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, metered."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, methods in _METHODS:
            if isinstance(obj, kind):
                return attr in methods.split()
        return type(obj).__module__.startswith("jinja2.") or isinstance(obj, _Namespace)

    def wrap_str_format(self, value: object) -> None:
        """Jinja would let str.format through here, with any width."""

    def call(self, context, obj, /, *args, **kwargs):
        if isinstance(obj, Macro):
            _weigh([args, kwargs])  # it can put them together: varargs, kwargs
        elif isinstance(obj, BuiltinMethodType) and obj.__name__ in _AMPLIFIERS:
            _amplifies(obj.__name__, obj.__self__, [*args, *kwargs.values()])
        return _made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context, operator: str, left, right):
        if operator == "%" and isinstance(left, str):
            if re.search(r"\*|\d{4}", left):
                raise _TooMuch("it formats to a width of more than 999")
            _spend(len(left) * (1000 + _weigh(right)))
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, _SIZED):
                    _spend(_weigh(sequence) * max(0, times))
        elif operator == "**" and abs(right) * _bits(left) > _LONGEST_INT:
            raise _TooMuch(f"it makes a number of more than {_LONGEST_INT} bits")
        elif operator == "+":
            _spend(sum(len(side) for side in (left, right) if isinstance(side, _SIZED)))
        return _made(super().call_binop(context, operator, left, right))

    def tick(self, cost: int) -> bool:
        """One round of a loop, one run of a macro, one comparison."""
        _spend(cost)
        return True

    def same(self, value: object) -> object:
        """A list, tuple or dict written in the template, or a slice; call() pays for it."""
        return value

    def tilde(self, *parts: object) -> str:
        """The operator ~, which intercepted_binops cannot name."""
        _spend(sum(map(_weigh, parts)))
        return "".join(map(str, parts))


def _bits(number: object) -> int:
    return number.bit_length() if isinstance(number, int) else 64


class _Metering(NodeTransformer):
    """Puts the meter into a template's syntax tree, where the sandbox has no hook of its own."""

    def _call(self, node: nodes.Node, method: str, *args: nodes.Expr) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)
        return call.set_lineno(node.lineno)

    def _tick(self, node: nodes.Node) -> nodes.Call:
        """What a run of this node prints from the template's own text, or 1."""
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        strings = (const.value for const in node.find_all(nodes.Const) if isinstance(const.value, str))
        return self._call(node, "tick", nodes.Const(written + sum(map(len, strings))))

    def _repeated(self, node):
        tick = self._tick(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _repeated

    def visit_For(self, node: nodes.For) -> nodes.For:
        test = node.test and self._tick(node)
        node = self._repeated(node)
        if test:
            node.test = nodes.And(test, node.test).set_lineno(node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.And:
        node = self.generic_visit(node)
        return nodes.And(self._call(node, "tick", nodes.Const(0)), node).set_lineno(node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        node = self.generic_visit(node)
        return self._call(node, "same", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        node = self.generic_visit(node)
        return self._call(node, "tilde", *node.nodes)

    def _literal(self, node):
        node = self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self._call(node, "same", node)

    visit_List = visit_Tuple = visit_Dict = _literal


class _Generation(Extension):
    """{% generation %}…{% endgeneration %}: marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_OPEN, _CLOSE)]
        return [marks[0], nodes.Scope(body).set_lineno(line), marks[1]]  # a scope, as it is in transformers


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace(), with no way into Python's own names and no contents when printed."""

    def __init__(*args, **kwargs):  # as Jinja's: namespace(self=…) is a name like any other
        self, *values = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*values, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format[:200])


def _dict(*args, **kwargs) -> dict:
    return dict(*args, **kwargs)


def _print(value: object) -> object:
    _spend(_weigh(value))
    return value


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        finalize=_print,
        autoescape=False,
    )
    filters = {name: environment.filters[name] for name in _FILTERS.split()} | {"tojson": _tojson}
    environment.filters = {name: _metered(name, function) for name, function in filters.items()}
    environment.tests = {name: _metered(name, function) for name, function in environment.tests.items()}
    environment.globals = {
        "range": environment.globals["range"],
        "dict": _dict,
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment
