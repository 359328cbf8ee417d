"""Talk to a model: one prompt, prompts from a file or a pipe, or a conversation.

    python infer.py --int4                                             # a conversation with what dpo.py made
    python infer.py --int4 --prompt "calculate 100 + 520 + 60"
    python infer.py --model Intel/neural-chat-7b-v3-1 --int4 --file prompts.txt --json

Answers go to standard output (several each below its prompt), everything else to standard error.
"""

import secrets
import sys

from minichat import cli
from minichat.errors import BadInput


def parse():
    """The flags, and the names of those that are not at their defaults."""
    parser = cli.Parser(__doc__)
    cli.model_flags(parser, "without it: runs/dpo, else runs/sft, else the embedded base")
    cli.chat_flags(parser)
    group = parser.add_argument_group("prompts (without one, and on a terminal: a conversation)")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="what to ask; given several times, a batch")
    group.add_argument("--file", metavar="FILE", help="one prompt a line, - is standard input")
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer")
    group.add_argument("--max-length", type=int, help="tokens of prompt and answer (without it: the model's context)")
    group.add_argument("--batch-size", type=int, default=16, help="prompts answered at a time")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy: always the likeliest token")
    group.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens, 0: all")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share")
    group.add_argument("--min-p", type=float, default=0.0, help="draw from tokens with this share of the likeliest's")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: tokens already there are rarer")
    group.add_argument(
        "--seed", type=cli.seed, help="of what is drawn (without it: a new one every time, which is printed)"
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text")
    cli.activations_flag(group)
    group.add_argument("--kv-cache", choices=["auto", "int8"], default="auto", help="of what was read: auto is bf16 "
                       "where all blocks run in one call on the CPU (INT4), else as the model; int8 is smaller, and "
                       "less exact")  # fmt: skip
    group.add_argument(
        "--speculate",
        action="store_true",
        help="guess the next tokens from the text so far, and check "
        "several at once: the same answers (in bf16 but for rounding), sooner where they copy",
    )
    group.add_argument("--json", action="store_true", help="one JSON object an answer, nothing streamed")
    args = parser.parse_args()
    return args, {name for name, value in vars(args).items() if value != parser.get_default(name)}


def main() -> None:
    args, changed = parse()
    cli.emulate(args)
    if args.file == "":
        raise BadInput("--file is empty; give it a file, or - for standard input")
    for name in ("max_new_tokens", "max_length", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise BadInput(f"{cli.flag(name)} is {value}; it must be 1 or more")
    if sys.stdout is None:
        raise BadInput("standard output is closed; answers go there")
    prompts = read_prompts(args)
    if args.model is None:
        args.model = cli.default_model("dpo", "sft")

    if prompts is None and (unused := changed & {"json", "batch_size"}):
        raise BadInput(f"{flags(unused)} in a conversation, which takes a line at a time; give --prompt or --file")

    from minichat import converse, generation

    seed = secrets.randbits(32) if args.seed is None else args.seed
    sampling = generation.Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, seed)
    if args.temperature == 0 and (unused := changed & {"top_k", "top_p", "min_p"}):
        raise BadInput(f"{flags(unused)} at --temperature 0, which draws nothing; give --temperature, such as 0.7")
    if args.speculate and (args.temperature or args.repetition_penalty != 1):
        raise BadInput("--speculate finds the likeliest tokens: it goes with --temperature 0 and no repetition penalty")
    if args.speculate and "batch_size" in changed and args.batch_size > 1:
        raise BadInput("--speculate takes one prompt at a time: leave --batch-size out")
    if args.speculate:
        args.batch_size = 1
    model, tokenizer = cli.load(args, only_to_decode=True)
    talk = converse.Talk(args, model, tokenizer, sampling)
    if prompts is None:
        talk.conversation()
    else:
        talk.answers(prompts)


def flags(names) -> str:
    """Names of arguments as the user types them."""
    return ", ".join(map(cli.flag, sorted(names)))


def read_prompts(args) -> list[tuple[str, str]] | None:
    """(where, prompt) of each prompt that the flags or a pipe give; None for a conversation."""
    if args.prompt is not None and args.file is not None:
        raise BadInput("--prompt and --file: give one of them")
    if args.prompt is not None:
        prompts = [(f"prompt {n} of {len(args.prompt)}", prompt) for n, prompt in enumerate(args.prompt, 1)]
        for where, prompt in prompts:
            if not prompt.strip():
                raise BadInput(f"{where} is empty; --prompt takes a text")
        return prompts
    if args.file in (None, "-") and sys.stdin is None:
        raise BadInput("standard input is closed; give --prompt TEXT or --file FILE")
    if args.file is None and sys.stdin.isatty():
        return None
    name = "standard input" if args.file in (None, "-") else args.file
    try:
        if args.file in (None, "-"):
            text = sys.stdin.read()
        else:
            with open(args.file, encoding="utf-8") as file:
                text = file.read()
        text = text.removeprefix("\ufeff")  # some editors begin a file with it
        text.encode()  # some locales let bad bytes through, as lone surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        before = error.object[: error.start]
        line = before.count(b"\n" if isinstance(before, bytes) else "\n") + 1
        raise BadInput(f"{name}:{line}: not UTF-8 text: {error}") from None
    lines = enumerate(text.split("\n"), 1)  # splitlines() knows nine more ends of a line
    prompts = [(f"{name}:{number}", line) for number, line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{name} is empty or blank; give --prompt TEXT, or --file FILE with a prompt a line")
    return prompts


if __name__ == "__main__":
    cli.run(main)
