"""Broken and hostile input by the thousand: what minichat cannot read, it refuses in one line.

    python bench/fuzz.py                                     # 10,000 cases, some minutes on one core
    python bench/fuzz.py --kinds template --cases 500 --seed 7
    python bench/fuzz.py --kinds config --seed 1 --only 123  # one case again: its traceback, and its files kept

A case is a small valid input, broken in one to four places by its kind, the seed and its number alone. It is read and
makes sense, or it is refused with a BadInput of one line. Any other exception, more than --deadline seconds, a crash
in native code, much memory, or a file written where there is only something to read, is a failure.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "FUZZ_CANARY": "out of its cage"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from minichat import chat, checkpoint, cli, examples, formats, lora, metrics, sources, store, weights  # noqa: E402
from minichat.errors import BadInput  # noqa: E402
from minichat.model import Config, Mistral  # noqa: E402
from minichat.optim import AdamW  # noqa: E402
from minichat.tokenizer import TextStream, Tokenizer  # noqa: E402

MEMORY = 3 << 29  # bytes of address space that a child may add to what it begins with
LONGEST = 1500  # characters of a refusal
TOKENIZER = Tokenizer(cli.BASE)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 2?\n\né"},
    {"role": "assistant", "content": "It is 3. </s> {{ 1 }}"},
]


class Hang(BaseException):
    """A case ran past its deadline; no `except Exception` swallows it."""


def require(right: object, what: str) -> None:
    if not right:
        raise AssertionError(f"what was read makes no sense: {what}")


# ---- breaking ----

# fmt: off
RAW = {"@nan": "NaN", "@inf": "1e999", "@digits": "9" * 5000, "@deep": "[" * 3000 + "]" * 3000, "@half": '"\\ud800"',
       "@half key": '{"\\udfff": 1}', "@comma": "1,", "@control": '"\x01"'}
ODD = [None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32, 2**63, -(2**63), 10**30, 10**400, 0.5, 1e308, 1e-320, "", "x",
       "0", "\0", "a\nb\r\u2028c", "\x1b[2J", "é😀", "a" * 3000, "../../etc/passwd", "/", "~x", "[", "(a+)+$", "(?P<a",
       "a{99999999999}", "(" * 900, "re:(.*)*(.*)*x", "(\\w+\\.?)+!", "F32", "BF16", "I64", [], {}, [[]], {"": {}},
       [None], [0, 0], [-1], ["a", 1], {"a": [1]}, list(range(300)), *RAW]
# worth adding to some file or other
KEYS = ["rope_scaling", "rope_parameters", "attention_bias", "head_dim", "quantization_config", "sliding_window",
        "architectures", "rope_theta", "weight_map", "metadata", "group_size", "num_bits", "ignore", "actorder",
        "rank_pattern", "alpha_pattern", "use_dora", "r", "lora_alpha", "eos_token", "added_tokens_decoder",
        "chat_template", "messages", "conversations", "chosen", "rejected", "prompt", "step", "run"]
# fmt: on


def spoilt(rng: Random, value):
    """A JSON value with one thing in it changed."""
    holder = value
    while isinstance(holder, dict | list) and holder:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        if not (isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.75):
            break
        holder = holder[key]
    if not isinstance(holder, dict | list) or not holder or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(ODD))
    how, was = rng.randrange(6), holder[key]
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(KEYS)] = copy.deepcopy(rng.choice(ODD))
    elif how == 2:
        other = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif how == 3 and isinstance(was, int | float):
        holder[key] = rng.choice((was + 1, was - 1, -was, was * 2, str(was)))
    elif how == 3 and isinstance(was, str):
        at = rng.randrange(len(was) + 1)
        holder[key] = rng.choice((was[:at], was + " ", was[:at] + rng.choice("\0\n\ud800. /é") + was[at:], [was]))
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def written(value) -> bytes:
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode("utf-8", "surrogatepass")


def cut(rng: Random, content: bytes, within: int = 1 << 30) -> bytes:
    """Bytes lost, moved, added or changed among the first `within`."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = min(within, len(content))
        at, to = sorted((rng.randrange(end + 1), rng.randrange(end + 1)))
        how = rng.randrange(5)
        if how == 0:
            del content[at:]
        elif how == 1:
            del content[at : min(to, at + 40)]
        elif how == 2:
            content[at:at] = rng.choice(
                (bytes(content[to : to + 40]), b"\0" * 9, b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"}")
            )
        elif content:
            at = min(at, len(content) - 1)
            content[at] = content[at] ^ (1 << rng.randrange(8)) if how == 3 else rng.randrange(256)
    return bytes(content)


def spoil(rng: Random, file: Path) -> None:
    """Break a file by its kind: its values, its bytes, or that it is one."""
    if rng.random() < 0.04:
        file.unlink()
        how = rng.randrange(4)
        if how == 1:
            file.touch()
        elif how == 2:
            file.mkdir()
        elif how == 3:
            file.symlink_to(file.name)
    elif rng.random() < 0.2 or file.suffix not in (".json", ".jsonl", ".safetensors"):
        content = file.read_bytes()
        header = 8 + struct.unpack("<Q", content[:8])[0] if file.suffix == ".safetensors" else len(content)
        file.write_bytes(cut(rng, content, header))
    elif file.suffix == ".safetensors":
        spoil_header(rng, file)
    elif file.suffix == ".json":
        value = json.loads(file.read_bytes())
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            value = spoilt(rng, value)
        file.write_bytes(written(value))
    else:
        lines = file.read_bytes().splitlines()
        for _ in range(rng.choice((1, 4, len(lines)))):
            i = rng.randrange(len(lines))
            with contextlib.suppress(ValueError, RecursionError):  # it may be broken by now
                lines[i] = written(spoilt(rng, json.loads(lines[i])))
        file.write_bytes(b"\n".join(lines))


def spoil_header(rng: Random, file: Path) -> None:
    """One or two things about the tensors of a safetensors file."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(rng.choice((1, 1, 2))):
        names = [name for name, tensor in header.items() if isinstance(tensor, dict) and "shape" in tensor]
        if not names:
            break
        name, how = rng.choice(names), rng.randrange(8)
        tensor = header[name]
        shape, (start, end) = tensor["shape"], tensor["data_offsets"]
        if how == 0:
            tensor["dtype"] = rng.choice(["BOOL", "F4", "U8", "I8", "F8_E4M3", "U16", "F16", "F32", "C64", "I64", "X9"])
        elif how == 1:
            tensor["shape"] = rng.choice(([], [0], [2**32] * 2, [2**62, 4], [-1], [1] * 70, shape[::-1], [1, *shape]))
        elif how == 2:
            offsets = ([end, start], [0, end], [start, 2**63], [start, start], [-1, end], [start + 1, end + 1])
            tensor["data_offsets"] = rng.choice(offsets)
        elif how == 3:
            other = rng.choice(names)
            header[name], header[other] = header[other], header[name]
        elif how == 4:
            header[rng.choice((name + ".x", name.upper(), "a\nb", "\0", "\x1b[2J", "n" * 9000, ""))] = header.pop(name)
        elif how == 5:
            header["__metadata__"] = rng.choice(({"a": 1}, {"format": "tf"}, [], None, {"a": "b" * 9000}, {"a": "\0"}))
        elif how == 6:
            del header[name]
        else:
            header = spoilt(rng, header)
            break
    text = written(header)
    said = rng.choice((len(text) - 1, 0, 2**32, 2**63, 2**64 - 1)) if rng.random() < 0.05 else len(text)
    file.write_bytes(struct.pack("<Q", said) + text + body)


# ---- hostile templates ----

# fmt: off
NAMES = ["messages", "message", "m", "x", "ns", "b", "bos_token", "eos_token", "loop", "self", "add_generation_prompt",
         "raise_exception", "none"]
ATTRIBUTES = ["content", "role", "__class__", "__mro__", "__globals__", "__init__", "__subclasses__", "format",
              "format_map", "join", "replace", "items", "keys", "append", "extend", "pop", "first", "last", "upper",
              "index", "zfill", "ljust", "center", "mro", "func_globals", "gi_frame"]
FILTERS = ["length", "list", "join", "upper", "trim", "tojson", "map", "select", "reject", "sum", "sort", "unique",
           "batch", "slice", "indent", "wordwrap", "center", "format", "replace", "reverse", "groupby", "attr",
           "xmlattr", "pprint", "string", "int", "float", "round", "random", "first", "last"]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "in", "==", "<", "and", "or"]
HOSTILE = ["{% include '/etc/passwd' %}", "{% import 'os' as x %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
           "{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**10 }}", "{{ range(10**9) | list }}",
           "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
           "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{{ 9 ** 9 ** 9 ** 9 }}",
           "{{ '%999999999d' % 1 }}", "{{ 'x'.center(10**10) }}", "{{ [[]] * 10**9 }}",
           "{{ '{0.__class__}'.format(x) }}",
           "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}",
           "{{ cycler.__init__.__globals__ }}", "{{ messages.append(messages) }}{{ messages }}", "{% break %}",
           "{{ raise_exception('no\\nno') }}", "{{ lipsum(n=10**9) }}", "{{ ('a' * 10**6) | indent(10**6) }}"]
# fmt: on


def expression(rng: Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice((*NAMES, "1", "-1", "99999999", "'a'", "'%s'", "[]", "{}", "range(9999)", "true", "1.5"))
    inner, how = (lambda: expression(rng, depth - 1)), rng.randrange(7)
    if how == 0:
        return f"({inner()} {rng.choice(OPERATORS)} {inner()})"
    if how == 1:
        return f"{inner()}.{rng.choice(ATTRIBUTES)}"
    if how == 2:
        return f"{inner()}.{rng.choice(ATTRIBUTES)}({inner()})"
    if how == 3:
        return f"({inner()} | {rng.choice(FILTERS)}{rng.choice(('', f'({inner()})', '(attribute=1)'))})"
    if how == 4:
        return f"{inner()}[{rng.choice(('', inner()))}:{inner()}]"
    return f"({inner()} if {inner()} else {inner()})" if how == 5 else f"[{inner()}, {inner()}]"


def statement(rng: Random, depth: int) -> str:
    e, how = expression(rng, 3), rng.randrange(8)
    inner = statement(rng, depth - 1) if depth else "{{ " + e + " }}"
    return (
        "{{ " + e + " }}",
        rng.choice(HOSTILE),
        "{% for m in messages %}" + inner + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for x in " + e + " recursive %}" + inner + "{{ loop(x) }}{% endfor %}",
        "{% if " + e + " %}" + inner + "{% else %}" + inner + "{% endif %}",
        "{% set x = " + e + " %}" + inner,
        "{% macro f(n) %}" + inner + "{% endmacro %}{{ f(" + e + ") }}",
        "{% generation %}" + inner + "{% endgeneration %}",
    )[how]


def spoil_template(rng: Random, folder: Path) -> None:
    text = chat.template_text(rng.choice(chat.names()), TOKENIZER)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.choice([0, *(match.end() for match in re.finditer("%}|}}", text))])
        text = (text[:at] if rng.random() < 0.9 else "") + statement(rng, 2) + text[at:]
    content = text.encode()
    (folder / "chat.jinja").write_bytes(cut(rng, content) if rng.random() < 0.2 else content)


# ---- the kinds: made once, broken in a copy, used ----


def small_model() -> Mistral:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    more = dict(num_key_value_heads=1, sliding_window=16, max_position_embeddings=512)
    model = Mistral(Config(vocab_size=TOKENIZER.vocab_size, **sizes, **more))
    model.init_weights(0)
    return model.eval()


def make_model(folder: Path) -> None:
    weights.save_model(small_model(), TOKENIZER, folder, dtype=torch.bfloat16)


def make_shards(folder: Path) -> None:
    weights.save_model(small_model(), TOKENIZER, folder, dtype=torch.bfloat16, shard_bytes=40_000)


def make_int4(folder: Path) -> None:
    make_model(folder / "plain")
    weights.save_model(*weights.load_model(folder / "plain", "cpu", int4=True), folder)
    shutil.rmtree(folder / "plain")


def make_adapter(folder: Path) -> None:
    make_model(folder / "base")
    model, _ = weights.load_model(folder / "base", "cpu")
    lora.attach(model, r=2, targets=("q_proj", "down_proj"), rank_pattern={"down_proj": 1}, seed=1)
    lora.save(model, folder, str(folder / "base"), {"base_fingerprint": model.identity, "base_beside": "base"})
    TOKENIZER.save(folder)


def make_tokenizer(folder: Path) -> None:
    TOKENIZER.save(folder, chat.template_text("chatml", TOKENIZER))
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "</s>"}, "x": null}')
    (folder / "config.json").write_text('{"eos_token_id": [2, 7]}')


def make_chats(folder: Path) -> None:
    chats = [
        {"messages": MESSAGES},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    chats += [{"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "completion": "b"}, {"text": "a b"}]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in chats))


def make_pairs(folder: Path) -> None:
    sides = {"chosen": "b", "rejected": "c"}
    lists = {key: [MESSAGES[1], {"role": "assistant", "content": value}] for key, value in sides.items()}
    pairs = [{"prompt": "a", **sides}, {"system": "", "question": "a", **sides}, {"prompt": "a", **lists}, lists]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in pairs))


def make_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": MESSAGES, "n": i} for i in range(4)]), folder / "d.parquet"
    )


def make_flags(folder: Path) -> None:
    (folder / "a.args").write_text(
        "# a comment\n--lr 1e-4 --steps 3 --lora-targets 'q_proj,v_proj'\n--betas 0.9 0.99\n"
    )


def make_checkpoint(folder: Path) -> None:
    model, optimizer = adapted()
    saved = checkpoint.Checkpoints(folder, {}, lambda new: lora.save(model, new / "adapter"))
    with metrics.Metrics(folder, 1, "fuzz") as log:
        saved.save(3, model, optimizer, log, {"tokens": 5})


def adapted() -> tuple[Mistral, AdamW]:
    model = lora.attach(small_model(), r=2, seed=1)
    optimizer = AdamW(model)
    for master in optimizer.masters:
        master.grad = torch.ones_like(master)
    optimizer.step(1e-3, 1.0)
    return model, optimizer


def use_model(rng: Random, folder: Path) -> None:
    model, tokenizer = weights.load_model(folder, "cpu", int4=rng.random() < 0.2)
    require(not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a weight was not read")
    with torch.no_grad():
        logits = model(torch.arange(20)[None] % model.config.vocab_size)
    require(logits.shape == (1, 20, model.config.vocab_size), f"logits are {tuple(logits.shape)}")
    use_words(rng, tokenizer)


def use_tokenizer(rng: Random, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    use_words(rng, tokenizer)
    use_chat(tokenizer, "auto")


def use_words(rng: Random, tokenizer: Tokenizer) -> None:
    require(all(0 <= id < tokenizer.vocab_size for id in tokenizer.stop_ids), f"stop ids {tokenizer.stop_ids}")
    for text in ("", "a 1\n\n+ 2", "</s><s> the sum", "é😀\u0301\ufffd ▁", "a" * 40 + "!", "\0 <|im_end|>"):
        ids = tokenizer.encode(text)
        require(all(0 <= id < tokenizer.vocab_size for id in ids), f"ids {ids} of {text!r}")
        cuts = sorted(rng.sample(range(len(text) + 1), min(2, len(text))))
        whole, counts = tokenizer.encode_cut(text, cuts)
        require(
            len(counts) == len(cuts) and sorted(counts) == counts and max(counts, default=0) <= len(whole), "counts"
        )
        stream = TextStream(tokenizer, ["sum"])
        said = "".join(stream.put(id) for id in ids) + stream.flush()
        require(said == stream.text, f"streamed {said!r}")


def use_chat(tokenizer: Tokenizer, template: str) -> None:
    for learn in ("assistant", "all"):
        ids, mask = chat.render(MESSAGES, template, tokenizer, learn=learn)
        require(len(ids) == len(mask) and set(mask) <= {0, 1}, "the mask is no mask of the ids")
        text = tokenizer.decode(ids, skip_special=False)
        require(os.environ["FUZZ_CANARY"] not in text and "root:x:0" not in text, "the template has read this machine")
    require(all(isinstance(end, str) and end for end in chat.stops(template, tokenizer)[1]), "stops")


def use_template(rng: Random, folder: Path) -> None:
    use_chat(TOKENIZER, str(folder / "chat.jinja"))


def use_data(rng: Random, folder: Path) -> None:
    template = chat.template_text(rng.choice(("neuralchat", "chatml", "mistral-instruct", "none")), TOKENIZER)
    length = rng.choice((8, 64, 999))
    pairs = folder.name == "pairs"
    named = rng.choice((None, None, *(formats.PAIRS if pairs else formats.CHATS)))
    encoder = examples.Dpo(TOKENIZER, template, length, length // 2, named) if pairs else None
    encoder = encoder or examples.Sft(TOKENIZER, template, length, named, rng.choice(("assistant", "all")))
    items, report = store.load(sources.find(str(folder)), encoder, rng.random() < 0.3)
    report.check()
    require(report.kept == len(items) > 0, f"{report} of {len(items)}")
    for item in items:
        require(0 < len(item) <= length, f"{len(item)} tokens")


def use_flags(rng: Random, folder: Path) -> None:
    """As a script does: what is wrong is one line on standard error, and exit code 2."""
    parser = cli.Parser("")
    cli.model_flags(parser, "")
    cli.training_flags(parser, folder / "run", lr=1e-4, warmup=0.03, batch_size=8, max_length=2048)
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            cli.run(lambda: cli.check_training(parser.parse_args([f"@{folder / 'a.args'}"])))
        except SystemExit as stop:
            if stop.code:
                require(stop.code == 2 and err.getvalue().startswith("error: "), f"{stop.code}: {err.getvalue()!r}")
                raise BadInput(err.getvalue()[:-1]) from None


def use_checkpoint(rng: Random, folder: Path) -> None:
    model, optimizer = adapted()
    with metrics.Metrics(None, 1, "fuzz") as log:
        step, tokens = checkpoint.Checkpoints(folder, {}, lambda new: None).resume(model, optimizer, log)
    require(isinstance(step, int) and step >= 0 and isinstance(tokens, int), f"step {step}, {tokens} tokens")
    checkpoint.differences({"--lr": 1}, dict(checkpoint.read(folder)[-1][1]["run"]) if step else {})


def spoil_any(pattern: str):
    """Break one of the files that match; a folder's other files are left as they are."""

    def broken(rng: Random, folder: Path) -> None:
        spoil(rng, rng.choice(sorted(folder.glob(pattern))))

    return broken


KINDS = {
    "config": (make_model, spoil_any("config.json"), use_model),
    "weights": (make_model, spoil_any("model.safetensors"), use_model),
    "shards": (make_shards, spoil_any("model*"), use_model),
    "int4": (make_int4, spoil_any("[cm]o*"), use_model),
    "adapter": (make_adapter, spoil_any("adapter_*"), use_model),
    "tokenizer": (make_tokenizer, spoil_any("*.json"), use_tokenizer),
    "template": (lambda folder: None, spoil_template, use_template),
    "chats": (make_chats, spoil_any("*"), use_data),
    "pairs": (make_pairs, spoil_any("*"), use_data),
    "parquet": (make_parquet, spoil_any("*"), use_data),
    "flags": (make_flags, spoil_any("*"), use_flags),
    "checkpoint": (make_checkpoint, spoil_any("checkpoints/step-3/*.*"), use_checkpoint),
}


# ---- running ----


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def case(name: str, seed: int, number: int, valid: Path, work: Path, deadline: float) -> tuple[str, str]:
    """One case: ("read" | "refused" | "FAILED", what was said). Its files are left in work/NAME."""
    _, break_it, use = KINDS[name]
    folder, rng = work / name, Random(f"{name} {seed} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid / name, folder)
    if (config := folder / lora.CONFIG).exists():  # names its base by an absolute path
        config.write_text(config.read_text().replace(str(valid), str(work)))
    break_it(rng, folder)
    before = listing(folder)

    def expired(*_):
        raise Hang

    signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, deadline)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(rng, folder)
        verdict, said = "read", ""
    except BadInput as error:
        verdict, said = "refused", str(error)
        if len(said.splitlines()) != 1 or len(said) > LONGEST:
            verdict = "FAILED"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "minichat/" in f.filename] or frames
        verdict, said = "FAILED", f"{type(error).__name__}: {error!s:.300} at {ours[-1].filename}:{ours[-1].lineno}"
        if os.environ.get("FUZZ_SHOW"):
            traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if verdict != "FAILED" and listing(folder) != before:
        verdict, said = "FAILED", "files were written where there was only something to read"
    return verdict, said


def run(name: str, seed: int, numbers: list[int], valid: Path, work: Path, deadline: float) -> list[tuple]:
    """(number, verdict, what was said) of each case, in forks: one that takes its process with it is a failure too."""
    found, log = [], work / "log"
    while len(found) < len(numbers):
        log.write_text("")
        todo = numbers[len(found) :]
        if not (pid := os.fork()):
            try:
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust tells of its panics itself
                with log.open("a", buffering=1) as out:
                    for number in todo:
                        out.write(json.dumps([number, *case(name, seed, number, valid, work, deadline)]) + "\n")
                os._exit(0)
            except BaseException as error:
                log.open("a").write(f"{type(error).__name__}: {error!s:.300}\n")
            finally:
                os._exit(1)
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.02)
            if time.time() - log.stat().st_mtime > deadline + 10:
                os.kill(pid, signal.SIGKILL)
        text = log.read_text().splitlines()
        lines = [json.loads(line) for line in text if line.startswith("[")]
        found += lines
        if len(lines) < len(todo):
            why = text[-1] if len(text) > len(lines) else "a crash, or a hang in native code"
            found.append([todo[len(lines)], "FAILED", f"took its process with it: {why}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of all kinds together (default: 10,000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case of each kind, in this process")
    parser.add_argument("--deadline", type=float, default=20, help="seconds that a case may take (default: 20)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as shelf:
        valid, work = Path(shelf) / "valid", Path(tempfile.mkdtemp(prefix="fuzz-case-")) if args.only else Path(shelf)
        for name in args.kinds:
            (valid / name).mkdir(parents=True)
            KINDS[name][0](valid / name)
        if args.only is not None:
            os.environ["FUZZ_SHOW"] = "1"
            for name in args.kinds:
                print(name, *case(name, args.seed, args.only, valid, work, args.deadline), work / name, sep=": ")
            return
        print("| kind | cases | read | refused | failed | seconds |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        failed = 0
        for name in args.kinds:
            start = time.perf_counter()
            found = run(name, args.seed, list(range(args.cases // len(args.kinds))), valid, work, args.deadline)
            counts = Counter(verdict for _, verdict, _ in found)
            numbers = " | ".join(f"{counts[verdict]:6,}" for verdict in ("read", "refused", "FAILED"))
            print(f"| {name:10} | {len(found):6,} | {numbers} | {time.perf_counter() - start:7.0f} |", flush=True)
            for number, verdict, said in found:
                if verdict == "FAILED":
                    print(f"  {name} {number}: {said[:400]!r}", flush=True)
            failed += counts["FAILED"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
