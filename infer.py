"""Talk to a model: one prompt, prompts from a file or a pipe, or a conversation.

    python infer.py --int4                                             # a conversation with what dpo.py made
    python infer.py --int4 --prompt "calculate 100 + 520 + 60"
    python infer.py --model Intel/neural-chat-7b-v3-1 --int4 --file prompts.txt --json

Answers go to standard output, everything else to standard error.
"""

import sys

from minichat import cli
from minichat.errors import BadInput


def parse():
    parser = cli.Parser(__doc__)
    cli.model_flags(parser, "without it: runs/dpo, else runs/sft, else the embedded base")
    cli.chat_flags(parser)
    group = parser.add_argument_group("prompts (without one, and on a terminal: a conversation)")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="what to ask; several make a batch")
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
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    group.add_argument("--json", action="store_true", help="one JSON object an answer, nothing streamed")
    return parser.parse_args()


def main() -> None:
    args = parse()
    prompts = read_prompts(args)
    if prompts is not None and not (prompts and all(prompt.strip() for prompt in prompts)):
        raise BadInput("the prompt is empty; give --prompt TEXT, or --file FILE with a prompt a line")
    if args.batch_size < 1:
        raise BadInput(f"--batch-size is {args.batch_size}; it must be 1 or more")
    args.model = args.model or cli.default_model("dpo", "sft")

    from minichat import converse, generation

    sampling = generation.Sampling(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed
    )
    print(f"minichat: loading {args.model}", file=sys.stderr)
    talk = converse.Talk(args, *cli.load(args), sampling)
    if prompts is None:
        talk.conversation()
    else:
        talk.answers(prompts)


def read_prompts(args) -> list[str] | None:
    """The prompts that the flags or a pipe give; None for a conversation."""
    if args.prompt is not None and args.file is not None:
        raise BadInput("--prompt and --file: give one of them")
    if args.prompt is not None:
        return args.prompt
    if args.file is None and sys.stdin.isatty():
        return None
    try:
        if args.file in (None, "-"):
            text = sys.stdin.read()
        else:
            with open(args.file, encoding="utf-8") as file:
                text = file.read()
        text.encode()  # some locales let bad bytes through, as lone surrogates
    except UnicodeError as error:
        raise BadInput(f"{args.file or 'standard input'}: not UTF-8 text: {error}") from None
    return [line for line in text.split("\n") if line.strip()]  # splitlines() knows nine more ends of a line


if __name__ == "__main__":
    cli.run(main)
