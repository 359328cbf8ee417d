"""Scores of a model on a file.

    python -m minichat.evaluate --model runs/dpo --data test.jsonl --int4

Records are JSON lines: {"question": …, "answer": …}; the score is the share of answers whose last number, or else
whose whole text, is the right one.
"""

import json
import re
import sys
from collections.abc import Sequence

from minichat import cli
from minichat.errors import BadInput


def last_number(text: str) -> str:
    """The last integer or decimal in a text without its thousands separators; the stripped text if it has none.

    "1,234.5" is one number, "3,4" and "3-4" are two, and a minus sign is one where no digit or letter precedes it.
    """
    number = r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    numbers = re.findall(number, text.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1].replace(",", "") if numbers else text.strip()


def exact_match(model, tokenizer, records: Sequence[dict], template: str, batch_size: int, max_new_tokens: int) -> dict:
    """Greedy answers to {"question", "answer"} records: {"exact_match": share, "answers": the texts}."""
    from minichat import chat, generation

    stop_ids, stop = chat.stops(template, tokenizer)
    prompts = [chat.prompt_ids([{"role": "user", "content": r["question"]}], template, tokenizer) for r in records]
    texts = [""] * len(records)
    by_length = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        batch = [prompts[i] for i in rows]
        answers = generation.answer(model, tokenizer, batch, max_new_tokens, generation.Sampling(), stop, stop_ids)
        for i, answer in zip(rows, answers):
            texts[i] = answer.text
    right = [last_number(text) == last_number(str(r["answer"])) for text, r in zip(texts, records)]
    return {"exact_match": sum(right) / len(right), "answers": texts}


def main() -> None:
    parser = cli.Parser(__doc__, prog="python -m minichat.evaluate")
    cli.model_flags(parser, "without it: runs/dpo, else runs/sft, else the embedded base")
    cli.chat_flags(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines of questions and answers")
    parser.add_argument("--batch-size", type=int, default=64, help="questions answered at a time")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--json", action="store_true", help="print the answers as well, as one JSON object")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise BadInput(f"--batch-size is {args.batch_size}; it must be 1 or more")
    args.model = args.model or cli.default_model("dpo", "sft")

    from minichat import chat, sources

    records = []
    for where, record in sources.all_records(sources.find(args.data)):
        if isinstance(record, BadInput):
            raise BadInput(f"{where}: {record}")
        if not isinstance(record.get("question"), str) or "answer" not in record:
            raise BadInput(f"{where}: fields {sorted(record)}; wanted: question + answer")
        records.append(record)
    if not records:
        raise BadInput(f"{args.data}: no record")
    model, tokenizer = cli.load(args)
    template = chat.template_text(args.template, tokenizer)
    scores = exact_match(model, tokenizer, records, template, args.batch_size, args.max_new_tokens)
    if args.json:
        print(json.dumps(scores))
    else:
        print(f"exact match {scores['exact_match']:.1%} of {len(records)}")
    print(f"minichat: {args.model} on {args.data}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
