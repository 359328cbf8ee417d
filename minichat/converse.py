"""What infer.py does once the model is there: answer prompts, or hold a conversation in the terminal."""

import argparse
import json
import sys

from minichat import chat, device, generation
from minichat.errors import BadInput
from minichat.generation import Answer, Sampling
from minichat.model import Mistral
from minichat.runs import describe, say
from minichat.tokenizer import Tokenizer


class Talk:
    """A model, how to sample from it, and the flags of infer.py."""

    def __init__(self, args: argparse.Namespace, model: Mistral, tokenizer: Tokenizer, sampling: Sampling):
        self.args, self.model, self.tokenizer, self.sampling = args, model, tokenizer, sampling
        context = model.config.max_position_embeddings
        self.limit = min(args.max_length or context, context)
        self.template = chat.template_text(args.template, tokenizer)
        say(describe(model))

    def ids(self, messages: list[dict]) -> list[int]:
        """The prompt's ids; BadInput if they and an answer pass the context."""
        ids = chat.prompt_ids(messages, self.template, self.tokenizer)
        if len(ids) + self.args.max_new_tokens > self.limit:
            raise BadInput(
                f"the prompt has {len(ids)} tokens; with --max-new-tokens {self.args.max_new_tokens} it passes "
                f"{self.limit}, the model's context or --max-length"
            )
        return ids

    def messages(self, prompt: str) -> list[dict]:
        system = [{"role": "system", "content": self.args.system}] if self.args.system else []
        return [*system, {"role": "user", "content": prompt}]

    def answer(self, prompts: list[list[int]], on_text=None) -> list[Answer]:
        args = self.args
        return generation.answer(
            self.model, self.tokenizer, prompts, args.max_new_tokens, self.sampling, args.stop, on_text=on_text
        )

    def answers(self, prompts: list[str]) -> None:
        """Answer every prompt; one is streamed, several come in batches and in order."""
        rendered = [self.ids(self.messages(prompt)) for prompt in prompts]
        for start in range(0, len(prompts), self.args.batch_size):
            batch = rendered[start : start + self.args.batch_size]
            alone = len(prompts) == 1 and not self.args.json
            found = self.answer(batch, on_text=_print if alone else None)
            for prompt, answer in zip(prompts[start:], found):
                if self.args.json:
                    print(json.dumps(self.record(prompt, answer), ensure_ascii=False), flush=True)
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
            "tokens_per_s": round(answer.tokens_per_s, 2),
        }

    def report(self, found: list[Answer]) -> None:
        new = sum(len(answer.ids) for answer in found)
        rate = sum(answer.tokens_per_s for answer in found if len(answer.ids) > 1)
        say(
            f"{found[0].first_token_seconds:.2f} s to the first token, {new} tokens at {rate:.1f} tokens/s, "
            f"peak memory {device.peak_memory_gib(self.model.device):.2f} GiB"
        )

    def conversation(self) -> None:
        """Ask and answer with history, until Ctrl-D or Ctrl-C at the prompt; Ctrl-C in an answer ends the answer."""
        say("Ctrl-C ends an answer, Ctrl-D the conversation; /new forgets it")
        history: list[dict] = []
        while True:
            try:
                line = input("you> ").strip()
                line.encode()  # some locales let bad bytes through, as lone surrogates
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            except UnicodeError as error:
                print(f"error: not UTF-8 text: {error}", file=sys.stderr)
                continue
            if line == "/new":
                history = []
            if not line or line == "/new":
                continue
            messages = self.messages(line)
            turn = [*messages[:-1], *history, messages[-1]]
            try:
                ids = self.fit(turn)
            except BadInput as error:  # this line is too long: the conversation goes on without it
                print(f"error: {error}", file=sys.stderr)
                continue
            pieces: list[str] = []

            def show(row: int, piece: str, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                _print(row, piece)

            try:
                self.report_after(self.answer([ids], on_text=show))
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
            history += [messages[-1], {"role": "assistant", "content": "".join(pieces)}]

    def fit(self, turn: list[dict]) -> list[int]:
        """The ids of a conversation, its oldest turns dropped until an answer fits."""
        start = 1 if turn[0]["role"] == "system" else 0
        while len(turn) - start >= 3:
            ids = chat.prompt_ids(turn, self.template, self.tokenizer)
            if len(ids) + self.args.max_new_tokens <= self.limit:
                return ids
            turn = [*turn[:start], *turn[start + 2 :]]
            say("the conversation passes the context: its oldest turn is forgotten")
        return self.ids(turn)

    def report_after(self, found: list[Answer]) -> None:
        print(flush=True)
        self.report(found)


def _print(_row: int, piece: str) -> None:
    print(piece, end="", flush=True)
