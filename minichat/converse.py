"""What infer.py does once the model is there: answer prompts, or hold a conversation in the terminal."""

import argparse
import codecs
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import TextIO

import torch

from minichat import chat, device, generation, int4
from minichat.console import plural, say
from minichat.errors import BadInput, within
from minichat.generation import Answer, Sampling
from minichat.model import Mistral
from minichat.tokenizer import Tokenizer

COMMANDS = "Ctrl-C ends an answer, Ctrl-D the conversation; /new begins another, /exit leaves, /help tells this"


class Talk:
    """A model, how to sample from it, and the flags of infer.py."""

    def __init__(self, args: argparse.Namespace, model: Mistral, tokenizer: Tokenizer, sampling: Sampling):
        self.args, self.model, self.tokenizer, self.sampling = args, model, tokenizer, sampling
        context = model.config.max_position_embeddings
        self.limit = context if args.max_length is None else min(args.max_length, context)
        self.template = chat.template_text(args.template, tokenizer)
        self.stop_ids, stop = chat.stops(self.template, tokenizer)
        self.stop = [*(args.stop or ()), *stop]
        self.kv = torch.int8 if args.kv_cache == "int8" else None
        self.kept = generation.Kept()
        say(describe(model))

    def ids(self, messages: list[dict]) -> list[int]:
        """The prompt's ids; BadInput if they are none of the model's, or pass the context with an answer."""
        ids = chat.prompt_ids(messages, self.template, self.tokenizer)
        if not self.fits(ids):
            raise BadInput(
                f"the prompt has {len(ids)} tokens; with --max-new-tokens {self.args.max_new_tokens} it passes "
                f"{self.limit}, the model's context or --max-length"
            )
        generation.check(self.model, [ids], self.args.max_new_tokens)
        return ids

    def fits(self, ids: list[int]) -> bool:
        return len(ids) + self.args.max_new_tokens <= self.limit

    def messages(self, prompt: str, history: Sequence[dict] = ()) -> list[dict]:
        system = [] if self.args.system is None else [{"role": "system", "content": self.args.system}]
        return [*system, *history, {"role": "user", "content": prompt}]

    def answer(self, prompts: list[list[int]], on_text=None) -> list[Answer]:
        new = self.args.max_new_tokens
        return generation.answer(
            self.model, self.tokenizer, prompts, new, self.sampling, self.stop, self.stop_ids, on_text,
            self.args.speculate, self.kv, self.kept,
        )  # fmt: skip

    def answers(self, prompts: list[tuple[str, str]]) -> None:
        """Answer every (where, prompt); one is streamed, several come in batches and in order.

        Raises BadInput that says where a bad prompt is, before any is answered.
        """
        rendered = []
        for where, prompt in prompts:
            with within(where):
                rendered.append(self.ids(self.messages(prompt)))
        for start in range(0, len(prompts), self.args.batch_size):
            batch = rendered[start : start + self.args.batch_size]
            alone = len(prompts) == 1 and not self.args.json
            found = self.answer(batch, on_text=_print if alone else None)
            for (_, prompt), answer in zip(prompts[start:], found):
                if self.args.json:
                    # where characters must be escaped, by JSON's rules: those of backslashreplace are others
                    print(json.dumps(self.record(prompt, answer), ensure_ascii=not _is_utf8(sys.stdout)), flush=True)
                elif alone:
                    print(flush=True)
                else:
                    print(f"> {prompt}\n{answer.text}\n", flush=True)
            self.report(found)

    def record(self, prompt: str, answer: Answer) -> dict:
        """What --json prints of an answer."""
        return {
            "prompt": prompt,
            "answer": answer.text,
            "finish": answer.finish,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": len(answer.ids),
            "first_token_seconds": round(answer.first_token_seconds, 4),
            "tokens_per_s": answer.tokens_per_s and round(answer.tokens_per_s, 2),
        }

    def report(self, found: list[Answer]) -> None:
        if "minichat.lazy" in sys.modules:  # an HPU emulated on a CPU, whose speed says nothing
            return
        new = sum(len(answer.ids) for answer in found)
        rate = sum(answer.tokens_per_s or 0 for answer in found)
        at = f" at {rate:.1f} tokens/s" * bool(rate)
        say(
            f"{found[0].first_token_seconds:.2f} s to the first token, {plural(new, 'token')}{at}, "
            f"peak memory {device.peak_memory_gib(self.model.device):.2f} GiB"
            + (f", --seed {self.sampling.seed}" if self.sampling.temperature else "")
        )

    def conversation(self) -> None:
        """Ask and answer with history, until Ctrl-D; Ctrl-C ends an answer, or drops a line half typed."""
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # not everywhere
                import readline  # noqa: F401  input() then has arrow keys and remembers lines
        new, stops = self.args.max_new_tokens, generation.all_stops(self.tokenizer, self.stop, self.stop_ids)
        generation.warm_up(self.model, 1, max(1, self.limit - new), new, self.sampling, stops, self.kv, say)
        say(COMMANDS)
        history: list[dict] = []
        while True:
            try:
                line = _ask("you> ").strip()
                line.encode()  # some locales let bad bytes through, as lone surrogates
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:  # it came too late to end an answer, or is meant for the line
                print(f"\n({COMMANDS})", file=sys.stderr)
                continue
            except UnicodeError as error:
                print(f"error: not UTF-8 text: {error}", file=sys.stderr)
                continue
            if line == "/exit":
                return
            if line == "/new":
                history = []
            if line in ("/new", "/help"):
                say("forgotten" if line == "/new" else COMMANDS)
            if not line or line in ("/new", "/help"):
                continue
            try:
                history, ids = self.fit(history, line)
            except BadInput as error:
                say("the conversation goes on without this line")
                print(f"error: {error}", file=sys.stderr)
                continue
            pieces: list[str] = []

            def show(row: int, piece: str, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                _print(row, piece)

            try:
                found = self.answer([ids], on_text=show)
                print(flush=True)
                self.report(found)
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
            if pieces:  # a question without an answer is as if it had not been asked: templates want them in turns
                said = {"role": "assistant", "content": "".join(pieces)}
                history = [*history, {"role": "user", "content": line}, said]

    def fit(self, history: list[dict], line: str) -> tuple[list[dict], list[int]]:
        """What of the history has room, its oldest turns dropped, and the ids of that and the new line.

        Raises BadInput for a line that has no room even alone.
        """
        self.ids(self.messages(line))
        while not self.fits(ids := chat.prompt_ids(self.messages(line, history), self.template, self.tokenizer)):
            history = history[2:]
            say("the conversation passes the context: its oldest turn is forgotten")
        return history, ids


def _print(_row: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _ask(prompt: str) -> str:
    """A line of standard input. The prompt is no answer: it goes to standard output on a terminal only."""
    if sys.stdout.isatty():
        return input(prompt)  # readline must know the prompt
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _is_utf8(stream: TextIO) -> bool:
    return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name == "utf-8"


def describe(model: Mistral) -> str:
    """One line: where it runs, how large it is."""
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    quantised = f", {model.scheme}" if model.scheme else ""
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    return f"{int4.count_weights(model) / 1e6:,.1f} M weights, {dtype}{quantised}, on {model.device}{threads}"
