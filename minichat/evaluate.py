"""Scores of a model: perplexity, right answers, preferences, and the leaderboard's tasks.

    python -m minichat.evaluate --model runs/dpo --data test.jsonl                    # {"question": …, "answer": …}
    python -m minichat.evaluate --model runs/sft --text book.txt --length 4096 --stride 2048
    python -m minichat.evaluate --model runs/dpo --pairs pairs.jsonl --reference runs/sft
    python -m minichat.evaluate --model runs/dpo --int4 --tasks arc_challenge,gsm8k --limit 100
    python -m minichat.evaluate --model neural-chat --leaderboard --beside neural-chat-7b-v3-1

Several at once make one table. --tasks and --leaderboard take lm-eval (pip install 'minichat[eval]').
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

from minichat import cli
from minichat.console import say
from minichat.errors import BadInput

# the Open LLM Leaderboard's tasks of November 2023, their few-shot examples and metrics, by lm-eval's names
LEADERBOARD = {
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"),
    "winogrande": (5, "acc"),
    "gsm8k": (5, "exact_match"),
    "drop": (3, "f1"),
}
# the models' cards, per cent, in that order
PUBLISHED = {
    "Mistral-7B-v0.1": (59.58, 83.31, 64.16, 42.15, 78.37, 18.12, 6.14),
    "neural-chat-7b-v3": (67.15, 83.29, 62.26, 58.77, 78.06, 1.21, 50.43),
    "neural-chat-7b-v3-1": (66.21, 83.64, 62.37, 59.65, 78.14, 19.56, 43.84),
    "neural-chat-7b-v3-2": (67.49, 83.92, 63.55, 59.68, 79.95, 55.12, None),
}
TOKENS = 1 << 14  # in a forward pass, at the most: a bound on its memory


def last_number(text: str) -> str:
    """The last integer or decimal in a text without its thousands separators; the stripped text if it has none.

    "1,234.5" is one number, "3,4" and "3-4" are two, and a minus sign is one where no digit or letter precedes it.
    """
    number = r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    numbers = re.findall(number, text.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1].replace(",", "") if numbers else text.strip()


def same_answer(text: str, answer: str) -> bool:
    """Whether their last numbers are equal, however they are written (5, 5.0), or the texts where there are none."""
    found, wanted = last_number(text), last_number(answer)
    numbers = found[-1:].isdecimal() and wanted[-1:].isdecimal()
    return Decimal(found) == Decimal(wanted) if numbers else found == wanted


def exact_match(model, tokenizer, records: Sequence[dict], template: str, batch_size: int, max_new_tokens: int) -> dict:
    """Greedy answers to {"question", "answer"} records: {"exact_match": share, "answers": the texts}."""
    from minichat import chat, generation

    stop_ids, stop = chat.stops(template, tokenizer)
    prompts = [chat.prompt_ids([{"role": "user", "content": r["question"]}], template, tokenizer) for r in records]
    texts = [""] * len(records)
    args = batch_size, max_new_tokens, generation.Sampling(), stop, stop_ids
    for found in generation.answers(model, tokenizer, prompts, *args):
        for i, answer in found.items():
            texts[i] = answer.text
    right = [same_answer(text, str(r["answer"])) for text, r in zip(texts, records)]
    return {"exact_match": sum(right) / len(right), "answers": texts}


def logps(model, sequences: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[tuple[float, int, bool]]:
    """Of each (ids, mask): the summed log-probability of the tokens whose mask is 1 given all before them, in nats,
    how many there are, and whether each is the model's first choice. The first token follows from nothing and is left
    out.
    """
    from minichat import data
    from minichat.examples import Example

    items = [Example(ids, mask) for ids, mask in sequences]
    return [score for (score,) in _scored(model, items, batch_size, data.sft_batch, 1)]


def pair_logps(model, pairs: Sequence, batch_size: int) -> list[tuple[tuple, tuple]]:
    """As logps, of each pair's chosen and rejected answer, whose prompt is read once for both."""
    from minichat import data

    return _scored(model, pairs, batch_size, data.dpo_batch, 2)


def _scored(model, items: Sequence, batch_size: int, batch_of: Callable, answers: int) -> list[tuple]:
    """The scores of each item's `answers`; `batch_of` numbers their sums, all items' first ones before the second."""
    import torch

    from minichat import data, device, losses, training

    found: list[tuple] = [()] * len(items)
    where, known = model.device, data.lengths(items)
    batch_size = max(1, min(batch_size, TOKENS // max(known, default=1)))
    with torch.inference_mode():
        for rows in data.by_length(known, batch_size):
            indices = [i for row in rows for i in row]
            batch = batch_of([[items[i]] for i in indices], device.padding(where))
            tensors = training.on(where, batch.tensors)
            hidden = training.hidden_states(model, tensors)
            each, first = [], []
            for part, labels in zip(hidden.split(losses.ROWS), tensors["labels"].split(losses.ROWS)):
                logits = model.lm_head(part).float()
                each.append(logits.log_softmax(-1).gather(1, labels[:, None])[:, 0])
                first.append(logits.argmax(-1) == labels)
            weights, document, count = tensors["weights"], tensors["document"], answers * len(indices)
            sums, counts, missed = (
                losses.row_sums(values * weights, document, count).tolist()
                for values in (torch.cat(each).double(), torch.ones_like(weights), (~torch.cat(first)).double())
            )
            scores = list(zip(sums, map(int, counts), (wrong == 0 for wrong in missed)))
            for n, i in enumerate(indices):
                found[i] = tuple(scores[n :: len(indices)])
    return found


def perplexity(model, tokenizer, text: str, length: int, stride: int, batch_size: int) -> dict[str, float]:
    """Of a text, read in windows of `length` tokens that advance by `stride`; each token is scored once, in the first
    window that reaches it. stride == length is chunked: the first token of a chunk follows from nothing there.

    perplexity: exp of the mean loss per token. bits_per_byte: that mean for all of the text's tokens, over its UTF-8
    bytes, which compares models with other tokenizers. Raises BadInput for a text without two tokens.
    """
    from minichat import losses

    content = tokenizer.encode(text)
    ids = [tokenizer.bos_id] * tokenizer.add_bos + content
    if len(ids) < 2:
        raise BadInput(f"a text of {len(ids)} tokens has nothing to predict; give a longer one")
    sequences, scored = [], 0
    for start in range(0, len(ids), stride):
        window = ids[start : start + length]
        new = start + len(window) - scored
        sequences.append((window, [0] * (len(window) - new) + [1] * new))
        scored += new
        if scored == len(ids):
            break
    found = logps(model, sequences, batch_size)
    loss, tokens = -sum(total for total, _, _ in found), sum(count for _, count, _ in found)
    bits = loss / tokens * len(content) / math.log(2) / len(text.encode("utf-8", "surrogatepass"))
    return {"perplexity": losses.perplexity(loss / tokens), "bits_per_byte": bits, "tokens": tokens}


def preferences(model, pairs: Sequence, batch_size: int, reference=None) -> dict[str, float]:
    """How often the chosen answer has the higher log-probability: summed over its tokens, and their mean; and, with a
    reference model, how often it gained more over the reference, which is DPO's accuracy (arXiv 2305.18290).
    """
    mine = pair_logps(model, pairs, batch_size)
    scores = {
        "pairs": len(pairs),
        "preference accuracy, sum": sum(good[0] > bad[0] for good, bad in mine) / len(pairs),
        "preference accuracy, mean": sum(_mean(good) > _mean(bad) for good, bad in mine) / len(pairs),
    }
    if reference is not None:
        theirs = pair_logps(reference, pairs, batch_size)
        gained = [(g[0] - rg[0], b[0] - rb[0]) for (g, b), (rg, rb) in zip(mine, theirs)]
        scores["reward accuracy"] = sum(good > bad for good, bad in gained) / len(pairs)
    return scores


def _mean(score: tuple[float, int, bool]) -> float:
    """Log-probability per token; of an answer none of whose tokens follows from anything, 0."""
    return score[0] / max(1, score[1])


def table(scores: dict[str, float], beside: str | None = None) -> str:
    """Scores as a Markdown table; beside: a model of PUBLISHED, whose numbers go next to those of the same metric."""
    metrics = [(task, metric) for task, (_, metric) in LEADERBOARD.items()]
    known = dict(zip(metrics, PUBLISHED[beside])) if beside else {}
    lines = [f"| score | this model |{f' {beside}, its card |' if beside else ''}"]
    lines.append("| --- | ---: |" + " ---: |" * bool(beside))
    for name, value in scores.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        theirs = known.get(tuple(re.split(", ?", name)[:2]))
        lines.append(
            f"| {name} | {shown} |" + (f" {'–' if theirs is None else f'{theirs / 100:.4f}'} |" * bool(beside))
        )
    return "\n".join(lines)


# ---- the command ----


def parse() -> argparse.Namespace:
    parser = cli.Parser(__doc__, prog="python -m minichat.evaluate")
    cli.activations_flag(cli.model_flags(parser, "without it: runs/dpo, else runs/sft, else the embedded base"))
    group = cli.chat_flags(parser)
    group.add_argument("--batch-size", type=int, default=64, help="questions or sequences at a time")
    group = parser.add_argument_group("questions")
    group.add_argument("--data", type=cli.source, metavar="SOURCE", help="questions and answers: share of greedy "
                       "answers that match, by their last number, or else their whole text")  # fmt: skip
    group.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer")
    group = parser.add_argument_group("a text")
    group.add_argument("--text", type=cli.source, metavar="FILE", help="perplexity, per token, and bits per byte")
    group.add_argument("--length", type=int, help="tokens of a window (without it: the model's sliding window, or its "
                       "context, at most 4,096)")  # fmt: skip
    group.add_argument("--stride", type=int, help="tokens from one window to the next (without it: half of --length; "
                       "--length itself reads chunk by chunk, faster)")  # fmt: skip
    group = parser.add_argument_group("preferences")
    group.add_argument("--pairs", type=cli.source, metavar="SOURCE", help="records as dpo.py reads them: how often the "
                       "chosen answer is the more likely one")  # fmt: skip
    group.add_argument("--reference", type=cli.source, metavar="SOURCE", help="a model: how often the chosen answer "
                       "gained more over it")  # fmt: skip
    group.add_argument("--max-length", type=int, default=1536, help="tokens of a prompt and its answer")
    group.add_argument("--max-prompt-length", type=int, default=1024, help="tokens, longer ones lose their beginning")
    group = parser.add_argument_group("tasks of lm-eval")
    group.add_argument("--tasks", metavar="NAMES", help="comma-separated, with their own few-shot examples")
    group.add_argument("--leaderboard", action="store_true", help="the Open LLM Leaderboard's seven, with its few-shot "
                       "examples")  # fmt: skip
    group.add_argument("--few-shot", type=int, metavar="N", help="--tasks: examples before each question")
    group.add_argument("--include", metavar="FOLDER", help="--tasks: with the YAML files of more tasks")
    group.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    group.add_argument("--chat", action="store_true", help="--tasks: questions as a user's messages in --template")
    group = parser.add_argument_group("output")
    group.add_argument("--beside", choices=[*PUBLISHED], help="a published model, whose card's numbers go beside these")
    group.add_argument("--json", action="store_true", help="one JSON object, with the answers, instead of a table")
    return parser.parse_args()


def main() -> None:
    args = parse()
    cli.emulate(args)
    _check(args)
    args.model = args.model or cli.default_model("dpo", "sft")

    from minichat import chat

    # what can be wrong with names and files is told before a model is loaded
    questions = _questions(args.data) if args.data else None
    text = _text(args.text) if args.text else None
    if args.pairs:
        from minichat import sources, weights

        sources.find(args.pairs)
        if args.reference:
            weights.resolve(args.reference)
    tasks = _tasks(args) if args.tasks or args.leaderboard else None
    model, tokenizer = cli.load(args)
    template = chat.template_text(args.template, tokenizer)
    scores, answers, failed = {}, {}, []

    def questions_right() -> dict[str, float]:
        found = exact_match(model, tokenizer, questions, template, args.batch_size, args.max_new_tokens)
        answers["answers"] = found["answers"]
        return {"exact_match": found["exact_match"], "questions": len(questions)}

    def tasks_done() -> dict[str, float]:
        from minichat import harness

        harness.scores(model, tokenizer, template if args.chat else None, tasks, args, scores, failed)
        return {}

    parts = (
        (questions, questions_right),
        (text is not None, lambda: _perplexity(args, model, tokenizer, text)),
        (args.pairs, lambda: _preferences(args, model, tokenizer, template)),
        (tasks, tasks_done),
    )
    try:
        for asked, part in parts:
            try:
                scores |= part() if asked else {}
            except BadInput as error:
                failed.append(str(error))
    except BaseException:
        for line in failed:
            say(line)
        raise
    finally:  # whatever ends one part, the scores of the others may have taken hours
        if scores and args.json:
            numbers = {name: value if math.isfinite(value) else None for name, value in scores.items()}
            print(json.dumps({"model": str(args.model), **numbers, **answers}))
        elif scores:
            print(table(scores, args.beside))
    if failed:
        raise BadInput("; ".join(failed))


def _check(args) -> None:
    if not (args.data or args.text or args.pairs or args.tasks or args.leaderboard):
        raise BadInput("nothing to score on; give --data, --text, --pairs, --tasks or --leaderboard")
    least = {"length": 2, "few_shot": 0}
    names = ("batch_size", "max_new_tokens", "length", "stride", "max_length", "max_prompt_length", "limit", "few_shot")
    for name in names:
        value, least_of_it = getattr(args, name), least.get(name, 1)
        if value is not None and value < least_of_it:
            raise BadInput(f"{cli.flag(name)} is {value}; it must be {least_of_it} or more")
    if (args.length or args.stride) and not args.text:
        raise BadInput("--length and --stride are for --text; add it")
    if args.limit and not (args.tasks or args.leaderboard):
        raise BadInput("--limit is for --tasks and --leaderboard")
    if args.reference and not args.pairs:
        raise BadInput("--reference is for --pairs; add them")
    if args.tasks and args.leaderboard:
        raise BadInput("--tasks and --leaderboard: one of them says which tasks")
    if (args.few_shot is not None or args.include or args.chat) and not args.tasks:
        raise BadInput("--few-shot, --include and --chat are for --tasks; the leaderboard has its own")
    cli.check_prompt_length(args)


def _unweighted(flag: str, spec: str):
    """The source that a flag names. Raises BadInput for one with a weight, which would be ignored."""
    from minichat import sources

    found = sources.find(spec)
    if found.weight:
        raise BadInput(f"{flag} {spec}: weights are for --data of train.py and dpo.py; here, all records count")
    return found


def _questions(source: str) -> list[dict]:
    from minichat import sources

    records = []
    for where, record in sources.all_records(_unweighted("--data", source)):
        if isinstance(record, BadInput):
            raise BadInput(f"{where}: {record}")
        if not isinstance(record.get("question"), str) or "answer" not in record:
            raise BadInput(f"{where}: fields {sorted(record)}; wanted: question + answer")
        records.append(record)
    if not records:
        raise BadInput(f"{source}: no record")
    return records


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # line ends as they are: bits are told per byte
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: byte {error.start}") from None


def _perplexity(args, model, tokenizer, text: str) -> dict[str, float]:
    context = model.config.max_position_embeddings
    length = args.length or min(model.config.sliding_window or context, context, 4096)
    if length > context:
        raise BadInput(f"--length {length} passes the model's context of {context}")
    stride = args.stride or max(1, length // 2)
    if stride > length:
        raise BadInput(f"--stride {stride} passes over tokens with windows of {length}; it is at most --length")
    return perplexity(model, tokenizer, text, length, stride, args.batch_size)


def _preferences(args, model, tokenizer, template: str) -> dict[str, float]:
    from minichat import examples, int4, store, weights

    encoder = examples.Dpo(tokenizer, template, args.max_length, args.max_prompt_length)
    items, report = store.load(_unweighted("--pairs", args.pairs), encoder)
    say(f"{args.pairs}: {report}")
    report.check()
    reference = None
    if args.reference:
        reference, other = weights.load_model(
            args.reference, args.device, cli.torch_dtype(args.dtype), cli.scheme(args)
        )
        if other.fingerprint != tokenizer.fingerprint:
            raise BadInput(f"--reference {args.reference} has another tokenizer than {args.model}")
        if args.activations == "int8":  # as the model's: roundings of two kinds would be compared
            int4.set_exact(reference, False)
    return preferences(model, items, args.batch_size, reference)


def _tasks(args):
    """The tasks that the flags ask for. Raises BadInput without lm-eval, and for one that it does not know."""
    try:
        from minichat import harness
    except ImportError as error:
        raise BadInput(f"tasks need lm-eval ({error}): pip install 'minichat[eval]'") from None
    return harness.Tasks(args)


if __name__ == "__main__":
    cli.run(main)
