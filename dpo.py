"""Preference alignment (DPO, arXiv 2305.18290) with a LoRA adapter, whose reference is the model without it.

    python dpo.py                                                      # continues `python train.py`
    python dpo.py --model teknium/OpenHermes-2.5-Mistral-7B --data pairs.jsonl --template chatml

Records are recognised by their fields: {"prompt": …, "chosen": …, "rejected": …}, each a string or a list of messages,
and "system" if there is one; "question" for "prompt"; or two whole conversations, {"chosen": [...], "rejected": [...]}.
"""

from minichat import cli, formats, run_folder
from minichat.errors import BadInput


def parse():
    parser = cli.Parser(__doc__)
    cli.model_flags(parser, "without it: runs/sft, else the embedded base")
    group = cli.chat_flags(parser)
    group.add_argument("--format", choices=list(formats.PAIRS), help="of the records (without it: recognised by their "
                       "fields)")  # fmt: skip
    group = parser.add_argument_group("preference loss")
    group.add_argument("--beta", type=float, default=0.1, help="how strongly the model is held to the reference")
    group.add_argument(
        "--loss", choices=["sigmoid", "ipo", "hinge", "robust"], default="sigmoid", help="the kind of loss"
    )
    group.add_argument("--label-smoothing", type=float, default=0.0, help="share of flipped pairs (cDPO, robust)")
    group.add_argument("--reference-free", action="store_true", help="take the reference's log-probs as equal")
    group.add_argument("--precompute-reference", action="store_true", help="compute the reference's log-probs once, "
                       "and keep them in the cache, instead of once in every epoch")  # fmt: skip
    group.add_argument("--reference", type=cli.source, metavar="SOURCE", help="another model as the reference (without "
                       "it: --model itself); its log-probs are computed once, before training")  # fmt: skip
    group.add_argument("--max-prompt-length", type=int, default=1024, help="tokens, longer ones lose their beginning")
    cli.training_flags(parser, run_folder.RUNS["dpo"], lr=5e-5, warmup=0.1, batch_size=4, max_length=1536)
    return cli.parse(parser, "dpo.args")


def main() -> None:
    args = parse()
    cli.emulate(args)
    cli.check_training(args)
    if not args.beta > 0:
        raise BadInput(f"--beta is {args.beta}; it must be positive")
    cli.check_prompt_length(args)
    if args.reference_free and (args.precompute_reference or args.reference):
        raise BadInput("--reference-free has no reference: it goes with neither --precompute-reference nor --reference")
    args.model = args.model or cli.default_model("sft")

    from minichat import chat, examples, runs, training

    try:
        method = training.dpo(args.beta, args.loss, args.label_smoothing, args.reference_free)
    except ValueError as error:
        raise BadInput(f"{error}") from None
    model, tokenizer = cli.load(args)

    template = chat.template_text(args.template, tokenizer)
    encoder = examples.Dpo(tokenizer, template, args.max_length, args.max_prompt_length, args.format)
    runs.train(args, model, tokenizer, method, encoder, "dpo")


if __name__ == "__main__":
    cli.run(main)
