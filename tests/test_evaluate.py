"""Scores: the number that an answer ends in, and the share of right ones against a loop over the records."""

import argparse
import functools
import importlib.util
import json
import math
import random
import shutil
import sys

import pytest
import tokenizers
import torch
from helpers import make

import minichat
from minichat import chat, cli, device, evaluate, generation, int4
from minichat.errors import BadInput
from minichat.evaluate import exact_match, last_number
from minichat.examples import Pair

harness = importlib.import_module("minichat.harness") if importlib.util.find_spec("lm_eval") else None

NUMBERS = {
    "So, the sum of 100, 520, and 60 is 680.": "680",
    "100 + 520 = 620\n620 + 60 = 680": "680",
    "The answer is 1,234,567.": "1234567",
    "It is 1,234.50 in all": "1234.50",
    "one of 3,4": "4",  # no thousands separator
    "1,2345": "2345",
    "12,345,67": "67",
    "the sum of 1,2,3": "3",
    "minus: -17": "-17",
    "5-3": "3",
    "x-3": "3",
    "(-3)": "-3",
    "3.": "3",
    "version 2.0, 3": "3",
    "it is .5": ".5",
    "= \N{MINUS SIGN}17": "-17",
    "5\N{MINUS SIGN}3": "3",
    "So it is 1.5.": "1.5",
    "x.5": "5",
    " no number \n": "no number",
    "": "",
}


@pytest.mark.parametrize("text, expected", NUMBERS.items())
def test_last_number(text, expected):
    assert last_number(text) == expected


def test_answers_are_numbers_however_they_are_written():
    for text, answer in (
        ("it is .5", "0.5"),
        ("5.", "5.0"),
        ("1,234.50 in all", "1234.5"),
        ("-0", "0"),
        ("yes", " yes"),
    ):
        assert evaluate.same_answer(text, answer) and evaluate.same_answer(answer, text)
    for text, answer in (("5.01", "5"), ("-5", "5"), ("five", "5"), ("nan", "0"), ("x\u00b2", "2"), ("", "0")):
        assert not evaluate.same_answer(text, answer) and not evaluate.same_answer(answer, text)
    assert evaluate.same_answer("nan", "nan")


class Answered:
    def __init__(self, text):
        self.text = text


def test_exact_match_is_a_loop_over_the_records(base, monkeypatch):
    """One record at a time and no cache of them; every other answer is set to what the model says."""
    model, tokenizer = minichat.load(base)
    questions = [f"calculate {a} + {b}" + " please" * (a % 3) for a in range(1, 8) for b in (2, 30)]
    texts = []
    for question in questions:
        prompt = chat.prompt_ids([{"role": "user", "content": question}], "zephyr", tokenizer)
        [ids] = minichat.generate(model, [prompt], 10, stop_ids=tokenizer.stop_ids)
        texts.append(tokenizer.decode(ids))
    answers = [text if i % 2 else "-1" for i, text in enumerate(texts)]
    right = sum(last_number(answer) == last_number(text) for answer, text in zip(answers, texts))
    assert 7 <= right < 14
    records = [{"question": q, "answer": a} for q, a in zip(questions, answers)]
    for batch_size in (1, 4, 50):
        found = exact_match(model, tokenizer, records, "zephyr", batch_size, 10)
        assert found["answers"] == texts and found["exact_match"] == right / 14
    numbers = [{"question": q, "answer": 680} for q in questions]  # JSON's, not a text
    monkeypatch.setattr(generation, "answer", lambda *args, **more: [Answered("It is 680.")] * len(args[2]))
    assert exact_match(model, tokenizer, numbers, "zephyr", 4, 10)["exact_match"] == 1


def test_the_embedded_answers_are_right_by_their_own_rule():
    """What the demo's data calls an answer is what its score reads in a worked answer."""
    from minichat.assets import sums

    for record in sums.records("pairs", 200, 3):
        chosen, rejected = (last_number(record[key]) for key in ("chosen", "rejected"))
        first = record["chosen"].split("sum of ")[1].split(",")[0].split(" and ")
        assert chosen.isdigit() and rejected.isdigit() and int(first[0]) <= int(chosen)
    for record in sums.records("test", 200, 3):
        assert last_number(sums.worked(record["numbers"], sum(record["numbers"]))) == record["answer"]


# ---- log-probabilities ----


@torch.no_grad()
def test_logps_are_the_definition():
    """Sums over the tokens that count, their number, and whether each is the most likely one; the first is left out."""
    model, rng = make(), random.Random(0)
    sequences = []
    for n in (2, 30, 7, 1, 19):
        ids = [rng.randrange(97) for _ in range(n)]
        sequences.append((ids, [rng.random() < 0.6 for _ in ids]))
    for _ in range(3):  # what the model says itself
        ids = minichat.generate(model, [[5, 6]], 8, stop_ids=())[0]
        sequences.append(([5, 6, *ids], [0, 0] + [1] * 8))
    expected = []
    for ids, mask in sequences:
        table = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        at = [t for t in range(1, len(ids)) if mask[t]]
        total = sum(float(table[t - 1, ids[t]]) for t in at)
        expected.append((total, len(at), all(int(table[t - 1].argmax()) == ids[t] for t in at)))
    assert [e[2] for e in expected[-3:]] == [True] * 3 and not expected[1][2]
    for batch_size in (1, 3, 99):
        for found, known in zip(evaluate.logps(model, sequences, batch_size), expected):
            assert found == (pytest.approx(known[0], abs=1e-4), known[1], known[2])


def begins_texts(folder):
    """Make its tokenizer one that begins texts with BOS, as Mistral's; the base's does not."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = json.loads((folder / "tokenizer_config.json").read_text())["bos_token"]
    single, ids = f"{bos} $A", [(bos, backend.token_to_id(bos))]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=ids)
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    return folder


@pytest.mark.parametrize("begun", [False, True], ids=["", "BOS"])
@pytest.mark.parametrize("length, stride", [(16, 16), (16, 8), (16, 5), (512, 512), (40, 1)])
@torch.no_grad()
def test_perplexity_is_that_of_transformers_windows(base, tmp_path, length, stride, begun):
    """The documentation's loop: windows that advance by the stride, each token scored where it comes first."""
    transformers = pytest.importorskip("transformers")
    if begun:
        base = begins_texts(shutil.copytree(base, tmp_path / "begun"))
    model, tokenizer = minichat.load(base)
    assert tokenizer.add_bos == begun
    text = "The sum of 12 and 30 is 42. Größer ist besser! " * 3
    other = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([[tokenizer.bos_id] * tokenizer.add_bos + tokenizer.encode(text)])
    total, count, before = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        end = min(start + length, ids.shape[1])
        window, labels = ids[:, start:end], ids[:, start:end].clone()
        labels[:, : -(end - before)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            total += float(other(window, labels=labels).loss) * scored
        count, before = count + scored, end
        if end == ids.shape[1]:
            break
    found = evaluate.perplexity(model, tokenizer, text, length, stride, 4)
    bits = len(tokenizer.encode(text)) / math.log(2) / len(text.encode())  # a byte, of a nat a token
    if stride < length or length > ids.shape[1]:  # a chunk's first token has nothing before it there
        assert found["tokens"] == count == ids.shape[1] - 1
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / count * bits, rel=1e-5)


def test_preference_accuracy_is_counted_pair_by_pair():
    model, reference, rng = make(), make(seed=1), random.Random(0)
    some = lambda: [rng.randrange(97) for _ in range(rng.randrange(2, 9))]  # noqa: E731
    pairs = [Pair(some(), some(), some()) for _ in range(40)]
    pairs[0].masks = [1] * len(pairs[0].chosen), [0] * (len(pairs[0].rejected) - 1) + [1]

    @torch.no_grad()
    def scores(model, pair):
        for answer, mask in zip((pair.chosen, pair.rejected), pair.masks):
            table = model(torch.tensor([pair.prompt + answer]))[0].log_softmax(-1)
            each = [float(table[len(pair.prompt) - 1 + i, t]) for i, t in enumerate(answer) if mask[i]]
            yield sum(each), sum(each) / len(each)

    mine, theirs = ([list(scores(m, p)) for p in pairs] for m in (model, reference))
    expected = {
        "pairs": 40,
        "preference accuracy, sum": sum(good[0] > bad[0] for good, bad in mine) / 40,
        "preference accuracy, mean": sum(good[1] > bad[1] for good, bad in mine) / 40,
        "reward accuracy": sum(g[0] - rg[0] > b[0] - rb[0] for (g, b), (rg, rb) in zip(mine, theirs)) / 40,
    }
    assert len(set(expected.values())) == 4
    assert evaluate.preferences(model, pairs, 7, reference) == pytest.approx(expected)
    del expected["reward accuracy"]
    assert evaluate.preferences(model, pairs, 40) == pytest.approx(expected)


@pytest.mark.parametrize("padded", [False, True])
def test_two_answers_in_one_row_score_as_two_sequences(padded, monkeypatch):
    """To 1e-5, past the window too, whatever is learnt of them; and a prompt is read once for both."""
    model, rng, read = make(sliding_window=8), random.Random(1), []
    some = lambda: [rng.randrange(97) for _ in range(rng.randrange(2, 20))]  # noqa: E731
    pairs = [Pair(some(), some(), some()) for _ in range(12)]
    pairs[0].masks = [1] * len(pairs[0].chosen), [0] * (len(pairs[0].rejected) - 1) + [1]
    pairs[1].rejected = pairs[1].chosen[:1]
    pairs[1].masks = [1] * len(pairs[1].chosen), [1]
    rows = [(p.prompt + a, [0] * len(p.prompt) + m) for p in pairs for a, m in zip((p.chosen, p.rejected), p.masks)]
    expected = evaluate.logps(model, rows, 4)
    if padded:  # as on an HPU
        monkeypatch.setattr(device, "padding", lambda where: lambda length: -(-length // 64) * 64)
    model.model.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    found = [score for pair in evaluate.pair_logps(model, pairs, 5) for score in pair]
    assert [score[1:] for score in found] == [score[1:] for score in expected]
    assert [score[0] for score in found] == pytest.approx([score[0] for score in expected], rel=1e-5, abs=1e-5)
    assert padded or sum(read) == sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


def test_a_table_puts_a_card_beside():
    scores = {"arc_challenge, acc_norm": 0.5, "drop, f1": 0.25, "tokens": 12345}
    assert evaluate.table(scores, "neural-chat-7b-v3-2").splitlines() == [
        "| score | this model | neural-chat-7b-v3-2, its card |",
        "| --- | ---: | ---: |",
        "| arc_challenge, acc_norm | 0.5000 | 0.6749 |",
        "| drop, f1 | 0.2500 | – |",
        "| tokens | 12,345 | – |",
    ]
    both = evaluate.table({"arc_challenge, acc": 0.5, "arc_challenge, acc_norm": 0.5}, "neural-chat-7b-v3-2")
    assert [line.endswith("| – |") for line in both.splitlines()[2:]] == [True, False]  # of the card's metric alone
    filtered = evaluate.table({"gsm8k, exact_match,strict-match": 0.5}, "neural-chat-7b-v3-2")
    assert filtered.endswith("| 0.5512 |")
    assert evaluate.table({"perplexity": 3.14159}).splitlines()[-1] == "| perplexity | 3.1416 |"


def test_the_leaderboards_tasks():
    """As the cards' tables are headed: ARC (25-s), HellaSwag (10-s), …; they print the means as well."""
    tasks = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k", "drop")
    assert tuple(evaluate.LEADERBOARD) == tasks
    assert [shots for shots, _ in evaluate.LEADERBOARD.values()] == [25, 10, 5, 0, 5, 5, 3]
    means = {"neural-chat-7b-v3": 57.31, "neural-chat-7b-v3-1": 59.06}
    for name, mean in means.items():
        assert sum(evaluate.PUBLISHED[name]) / 7 == pytest.approx(mean, abs=0.006)


# ---- lm-eval ----

QUESTIONS = [
    {"question": f"How much is {a} + {b}?", "choices": [str(a + b), str(a + b + 1), str(a * b)], "answer": a % 3}
    for a in range(3, 10)
    for b in (4, 11)
]
TASKS = {
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} It is {{choices[0]}}, and not {{choices[1]}}. " * 9,  # longer than the context
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["7", "\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks; the index of it and of lm-eval's own, which takes seconds, is made once."""
    if harness is None:
        pytest.skip("needs lm-eval")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(q)}\n" for q in QUESTIONS))
    broken = {"broken": {**TASKS["written"], "doc_to_text": "{{a.b}}"}}
    for name, task in (TASKS | broken).items():
        (folder / f"{name}.yaml").write_text(json.dumps({**common(folder, name), **task}))  # JSON is YAML
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TaskManager", functools.cache(harness.TaskManager))
        yield folder


def common(folder, name):
    files = {"data_files": {"test": str(folder / "questions.jsonl")}}
    return {"task": f"minichat_{name}", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "int4"])
def test_lm_eval_gets_what_its_own_model_computes(base, tasks, tmp_path, quantised, capsys):
    """Metrics to 1e-4, greedy answers, log-likelihoods: of a model whose weights are bf16, or INT4, whose kernel rounds
    activations to 15 bits."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    model, tokenizer = minichat.load(base, int4=quantised)
    # no tokens of single bytes: what is no UTF-8, a stream has to show otherwise than a text that is decoded at its end
    model.lm_head.weight.data[[i for i in range(300) if "\ufffd" in tokenizer.decode([i])]] = 0
    minichat.save(model if quantised else model.to(torch.bfloat16), tokenizer, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 64}))
    model, tokenizer = minichat.load(folder, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = HFLM(pretrained=other, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)
    ours = harness.Harness(model, tokenizer, None, 4)
    names = [f"minichat_{name}" for name in TASKS]
    found = []
    for each in (ours, theirs):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found.append(evaluator.simple_evaluate(each, tasks=names, task_manager=manager, bootstrap_iters=0))
    for name in names:
        one, two = ({k: v for k, v in f["results"][name].items() if isinstance(v, float)} for f in found)
        assert len(one) >= 1 and one == pytest.approx(two, abs=1e-4, rel=1e-4)
        for a, b in zip(*(f["samples"][name] for f in found)):
            one, two = flat(a["resps"]), flat(b["resps"])
            assert one == (two if isinstance(two[0], str) else pytest.approx(two, rel=1e-3 if quantised else 1e-5))
    args = argparse.Namespace(
        tasks="minichat_chosen", leaderboard=False, few_shot=2, include=str(tasks), limit=6, batch_size=3
    )
    args.tasks += ",minichat_broken"
    again, lines = {}, []
    harness.scores(model, tokenizer, None, harness.Tasks(args), args, again, lines)
    [failed] = lines
    assert failed.startswith("task minichat_broken: ") and "\n" not in str(BadInput(failed))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    more = dict(num_fewshot=2, limit=6, bootstrap_iters=0, task_manager=manager)
    expected = evaluator.simple_evaluate(theirs, tasks=["minichat_chosen"], **more)["results"]["minichat_chosen"]
    assert again == {
        "minichat_chosen, acc": pytest.approx(expected["acc,none"]),
        "minichat_chosen, acc_norm": pytest.approx(expected["acc_norm,none"]),
    }
    with pytest.raises(BadInput, match="task 'minichat_none' is unknown"):
        harness.Tasks(argparse.Namespace(**{**vars(args), "tasks": "minichat_none"}))
    with pytest.raises(BadInput, match="--include none: no such folder"):
        harness.Tasks(argparse.Namespace(**{**vars(args), "include": "none"}))


def flat(value):
    return [inner for each in value for inner in flat(each)] if isinstance(value, list | tuple) else [value]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("begun", [False, True], ids=["", "BOS"])
def test_lm_eval_reads_texts_as_its_own_model_does(base, tmp_path, begun):
    """With BOS where the tokenizer begins texts so, and never a second one."""
    if harness is None:
        pytest.skip("needs lm-eval")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if begun:
        base = begins_texts(shutil.copytree(base, tmp_path / "begun"))
    model, tokenizer = minichat.load(base)
    other = AutoModelForCausalLM.from_pretrained(base)
    theirs = HFLM(pretrained=other, tokenizer=AutoTokenizer.from_pretrained(base))
    ours = harness.Harness(model, tokenizer, None, 1)
    for text in ("How much is 1 + 2?", " a", "", "<s>How much", "a</s>b"):
        for add in (None, True, False):
            if add is None or begun:  # what a tokenizer without BOS adds there is its own affair
                assert ours.tok_encode(text, add) == theirs.tok_encode(text, add), (text, add)
    assert tokenizer.add_bos == begun == (ours.tok_encode("a")[:1] == [tokenizer.bos_id])


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gets_answers_to_the_ends_of_long_contexts(base, monkeypatch):
    """As its own model: what does not fit beside the new tokens goes on the left; the sampling is the request's."""
    if harness is None:
        pytest.skip("needs lm-eval")
    model, (_, tokenizer), asked = make(max_position_embeddings=40), minichat.load(base), []
    answers = lambda *args: asked.append(args) or [{n: Answered(str(len(p))) for n, p in enumerate(args[2])}]  # noqa: E731
    monkeypatch.setattr(generation, "answers", answers)
    text, greedy = "How much is 1 + 2? " * 9, {"until": ["\n", ""], "max_gen_toks": 12}
    drawn = {**greedy, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.5}
    requests = [Request("a", greedy), Request(text, drawn), Request(text, greedy)]
    found = harness.Harness(model, tokenizer, None, 4).generate_until(requests)
    ids = tokenizer.encode(text)
    assert [p for args in asked for p in args[2]] == [tokenizer.encode("a"), ids[-28:], ids[-28:]]
    assert found == [str(len(tokenizer.encode("a"))), "28", "28"]
    one, two = (args[5] for args in asked)
    assert (one.temperature, two.temperature, two.top_k, two.top_p) == (0, 0.7, 5, 0.5)
    assert all(args[3:5] == (4, 12) and args[6] == ["\n"] for args in asked)
    with pytest.raises(BadInput, match="wants 40 new tokens; the model's context is 40"):
        harness.Harness(model, tokenizer, None, 4).generate_until([Request("a", {**greedy, "max_gen_toks": 40})])


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_asks_in_the_chat_template(base):
    """A request is the template's text, its special tokens are those that it writes, and no BOS is added to it."""
    if harness is None:
        pytest.skip("needs lm-eval")
    model, tokenizer = minichat.load(base)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2?"}]
    for name in ("neuralchat", "zephyr", "chatml"):
        template = chat.template_text(name, tokenizer)
        asked = harness.Harness(model, tokenizer, template, 1)
        text = asked.apply_chat_template(messages)
        assert text == chat.text(messages, name, tokenizer, True) and asked.chat_template(True) == template
        assert asked.tok_encode(text) == chat.prompt_ids(messages, name, tokenizer)
    assert harness.Harness(model, tokenizer, None, 1).chat_template(False) is None


@pytest.mark.filterwarnings("ignore")
def test_a_begun_answer_goes_on(base):
    """A task's gen_prefix, as transformers' template has it."""
    transformers = pytest.importorskip("transformers")
    if harness is None:
        pytest.skip("needs lm-eval")
    model, tokenizer = minichat.load(base)
    other = transformers.AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "The answer is"}]
    for name in ("neuralchat", "zephyr", "chatml"):
        other.chat_template = template = chat.template_text(name, tokenizer)
        expected = other.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        found = harness.Harness(model, tokenizer, template, 1).apply_chat_template(
            messages, add_generation_prompt=False
        )
        assert found == expected and found.endswith("The answer is")


WRONG = {
    "nothing to score": ([], "nothing to score on"),
    "one token": (["--text", "t.txt", "--length", "1"], "--length is 1; it must be 2 or more"),
    "stride": (["--text", "t.txt", "--length", "8", "--stride", "9"], "--stride 9 passes over tokens"),
    "context": (["--text", "t.txt", "--length", "9999999"], "passes the model's context"),
    "no text": (["--data", "q.jsonl", "--stride", "9"], "--length and --stride are for --text"),
    "empty text": (["--text", "empty.txt"], "has nothing to predict"),
    "binary": (["--text", "b.bin"], "b.bin is not UTF-8"),
    "limit": (["--data", "q.jsonl", "--limit", "9"], "--limit is for --tasks"),
    "shots": (["--tasks", "x", "--few-shot", "-1"], "--few-shot is -1; it must be 0 or more"),
    "shots without tasks": (["--leaderboard", "--few-shot", "0"], "--few-shot, --include and --chat are for --tasks"),
    "chat": (["--data", "q.jsonl", "--chat"], "--few-shot, --include and --chat are for --tasks"),
    "length without a text": (["--data", "q.jsonl", "--length", "9"], "--length and --stride are for --text"),
    "no room": (["--pairs", "p.jsonl", "--max-length", "9", "--max-prompt-length", "9"], "leaves no room"),
    "weight": (["--data", "q.jsonl:2"], "--data q.jsonl:2: weights are for"),
    "weight of pairs": (["--pairs", "p.jsonl:2"], "--pairs p.jsonl:2: weights are for"),
    "tokens": (["--data", "q.jsonl", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    "both": (["--tasks", "x", "--leaderboard"], "--tasks and --leaderboard"),
    "reference": (["--data", "q.jsonl", "--reference", "x"], "--reference is for --pairs"),
    "no reference": (["--pairs", "p.jsonl", "--reference", "nowhere"], "nowhere: no such folder"),
    "no pairs": (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
    "fields": (["--pairs", "q.jsonl"], "q.jsonl"),
}


@pytest.mark.parametrize("flags, why", WRONG.values(), ids=WRONG)
def test_wrong_flags_are_one_line(base, tmp_path, monkeypatch, capsys, flags, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("The sum of 1 and 2 is 3. " * 9)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 2?", "answer": "3"}\n')
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 + 2?", "chosen": "3", "rejected": "4"}\n')
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(base), *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main)
    out, err = capsys.readouterr()
    assert (
        stop.value.code == 2 and not out and why in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    )


@pytest.mark.parametrize("error, code", [(RuntimeError("CUDA out of memory"), 2), (KeyboardInterrupt(), 130)])
def test_scores_are_told_whatever_ends_the_next_part(base, tmp_path, monkeypatch, capsys, error, code):
    def fail(*_):
        raise error

    (tmp_path / "t.txt").write_text("The sum of 1 and 2 is 3. " * 9)
    monkeypatch.setattr(evaluate, "_preferences", fail)
    flags = ["--text", tmp_path / "t.txt", "--pairs", tmp_path / "t.txt", "--json"]
    monkeypatch.setattr(evaluate, "perplexity", lambda *_: {"perplexity": float("inf"), "tokens": 5})
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(base), *map(str, flags)])
    monkeypatch.setattr("minichat.sources.find", lambda name: name)
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main)
    assert stop.value.code == code
    found = json.loads(capsys.readouterr().out, parse_constant=fail)  # JSON has no Infinity
    assert found["perplexity"] is None and found["tokens"] == 5


def test_a_pair_that_follows_from_nothing(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "", "chosen": "", "rejected": "b"}\n')
    flags = ["--pairs", tmp_path / "p.jsonl", "--template", "none", "--json"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(base), *map(str, flags)])
    cli.run(evaluate.main)
    assert json.loads(capsys.readouterr().out)["pairs"] == 1


def test_a_part_that_fails_takes_no_other_score_with_it(base, tmp_path, monkeypatch, capsys):
    """That the reference has another tokenizer is known late: what was scored is printed, and the exit code 2."""
    (tmp_path / "t.txt").write_text("The sum of 1 and 2 is 3. " * 9)
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 + 2?", "chosen": "3", "rejected": "4"}\n')
    shutil.copytree(base, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    flags = ["--text", tmp_path / "t.txt", "--pairs", tmp_path / "p.jsonl", "--reference", tmp_path / "other"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(base), *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "| perplexity |" in out and "another tokenizer" in err.splitlines()[-1]


def test_a_reference_is_rounded_as_the_model(base, tmp_path, monkeypatch):
    """Or roundings of two kinds would be compared."""
    pair = {"prompt": "1 + 2?", "chosen": "It is 3.", "rejected": "It is 4."}
    (tmp_path / "p.jsonl").write_text(json.dumps(pair) + "\n")
    seen = []
    score = lambda model, items, size, reference: (seen.extend([model, reference]), {"reward accuracy": 0.0})[1]  # noqa: E731
    monkeypatch.setattr(evaluate, "preferences", score)
    flags = ["--pairs", str(tmp_path / "p.jsonl"), "--reference", str(base), "--int4", "--activations", "int8"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(base), *flags])
    evaluate.main()
    exact = [{m.exact for m in each.modules() if isinstance(m, int4.Int4Linear)} for each in seen]
    assert exact == [{False}, {False}]


@pytest.mark.parametrize(
    "flags, length, stride", [((), 16, 8), (("--length", 20), 20, 10), (("--length", 20, "--stride", 7), 20, 7)]
)
def test_windows_of_a_text_are_the_flags(base, tmp_path, monkeypatch, capsys, flags, length, stride):
    text = "The sum of 1 and 2 is 3. " * 9
    (tmp_path / "t.txt").write_text(text)
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "--model", str(base), "--text", str(tmp_path / "t.txt"), "--json", *map(str, flags)]
    )
    cli.run(evaluate.main)
    model, tokenizer = minichat.load(base)  # whose window is of 16 tokens
    expected = evaluate.perplexity(model, tokenizer, text, length, stride, 64)
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    "window, context, length",
    [(None, 512, 512), (16, 512, 16), (600, 512, 512), (None, 32768, 4096), (8192, 32768, 4096)],
)
def test_the_window_of_a_text_without_flags(monkeypatch, window, context, length):
    monkeypatch.setattr(evaluate, "perplexity", lambda *args: args)
    model = make(sliding_window=window, max_position_embeddings=context)
    args = argparse.Namespace(length=None, stride=None, batch_size=7)
    assert evaluate._perplexity(args, model, None, "a") == (model, None, "a", length, length // 2, 7)


def test_a_text_is_read_as_its_bytes_are(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\n")
    assert evaluate._text(str(tmp_path / "t.txt")) == "a\r\nb\n"  # but for the mark that says UTF-8


@pytest.mark.parametrize("as_json", [True, False])
def test_several_scores_make_one_table(base, tmp_path, monkeypatch, capsys, as_json):
    (tmp_path / "t.txt").write_text("The sum of 1 and 2 is 3. " * 9)
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 + 2?", "chosen": "3", "rejected": "4"}\n' * 3)
    flags = ["--text", str(tmp_path / "t.txt"), "--pairs", str(tmp_path / "p.jsonl"), "--reference", str(base)]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", str(base), *flags, *["--json"] * as_json])
    cli.run(evaluate.main)
    out = capsys.readouterr().out
    names = ["perplexity", "bits_per_byte", "tokens", "pairs", "preference accuracy, sum", "preference accuracy, mean"]
    if as_json:
        found = json.loads(out)
        assert [*found] == ["model", *names, "reward accuracy"]
        assert found["reward accuracy"] == 0  # over itself nothing is gained
    else:
        assert [line.split(" | ")[0][2:] for line in out.splitlines()[2:]] == [*names, "reward accuracy"]
