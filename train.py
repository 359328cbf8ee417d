"""Supervised fine-tuning: a LoRA adapter, or all weights.

    python train.py                                                    # the embedded base learns to work out sums
    python train.py --model mistralai/Mistral-7B-v0.1 --data chats.jsonl --template zephyr
    python train.py --full --from-config FOLDER --data texts.jsonl     # a new model, from config.json and tokenizer

Records are recognised by their fields: {"messages": [{"role": …, "content": …}, …]}, {"conversations": [{"from": …,
"value": …}, …]}, {"prompt": …, "completion": …}, {"instruction": …, "input": …, "output": …}, {"query": …, "response":
…}, {"question": …, "response": …, "system_prompt": …} or {"text": …}.
"""

from minichat import cli, formats, run_folder
from minichat.errors import BadInput


def parse():
    parser = cli.Parser(__doc__)
    group = cli.model_flags(parser, "without it: the embedded base")
    group.add_argument("--from-config", metavar="FOLDER", help="start from random weights: config.json and tokenizer")
    group = cli.chat_flags(parser)
    group.add_argument("--format", choices=list(formats.CHATS), help="of the records (without it: recognised by their "
                       "fields)")  # fmt: skip
    group.add_argument("--learn", choices=["assistant", "all"], default="assistant", help="which tokens of a chat")
    group.add_argument("--pack", action="store_true", help="several sequences in a row of --max-length tokens, none of "
                       "which sees another; --batch-size counts rows then")  # fmt: skip
    group.add_argument("--max-prompt-length", type=int, help="tokens before the first answer, longer ones lose their "
                       "beginning (without it: only --max-length counts)")  # fmt: skip
    cli.training_flags(parser, run_folder.RUNS["sft"], lr=1e-4, warmup=0.03, batch_size=8, max_length=2048)
    return cli.parse(parser, "sft.args")


def main() -> None:
    args = parse()
    cli.emulate(args)
    cli.check_training(args)
    cli.check_prompt_length(args)
    if args.max_prompt_length is not None and args.learn == "all":
        raise BadInput("--max-prompt-length is of what nothing learns; with --learn all only --max-length counts")
    if args.from_config and not args.full:
        raise BadInput("--from-config starts from random weights: there is nothing to adapt; add --full")
    if args.from_config and (args.model or args.adapter):
        raise BadInput("--from-config makes a new model; it goes with neither --model nor --adapter")
    args.model = args.model or args.from_config or cli.default_model()

    from minichat import chat, examples, runs, training

    model, tokenizer = runs.new_model(args) if args.from_config else cli.load(args)

    template = chat.template_text(args.template, tokenizer)
    encoder = examples.Sft(tokenizer, template, args.max_length, args.format, args.learn, args.max_prompt_length)
    runs.train(args, model, tokenizer, training.sft(), encoder, "sft")


if __name__ == "__main__":
    cli.run(main)
