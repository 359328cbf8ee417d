"""lm-eval over a minichat model: the extra `eval`. What its own `hf` model computes, on whatever minichat runs."""

import argparse
import logging
import os

from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from minichat import chat, evaluate, generation
from minichat.errors import BadInput

AT_ONCE = 512  # requests between two looks at the progress bar


class Harness(TemplateLM):
    """A model and its tokenizer, as lm-eval asks for it. template: Jinja text for chat requests, or None for none.

    A template's text holds what special tokens it wants; without one, the tokenizer's own BOS begins a context.
    """

    def __init__(self, model, tokenizer, template: str | None, batch_size: int):
        super().__init__()
        self.model, self.template, self.batch_size = model, template, batch_size
        self.words = tokenizer  # `tokenizer` would be taken for a transformers one

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.words.eos_id if self.words.bos_id is None else self.words.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.words.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = chat.text(chat_history, self.template, self.words, add_generation_prompt)
        if not add_generation_prompt:  # an answer is begun, and is to go on
            begun = chat_history[-1]["content"].rstrip()
            text = text[: text.rindex(begun) + len(begun)]
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        add = self.words.add_bos and self.template is None if add_special_tokens is None else add_special_tokens
        begun = add_special_tokens is None and string.startswith(self.words.decode([self.prefix_token_id], False))
        return [self.words.bos_id] * bool(add and not begun) + self.words.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        longest = self.max_length + 1  # the last token is predicted, not read
        sequences = [
            ((context + said)[-longest:], ([0] * len(context) + [1] * len(said))[-longest:])
            for _, context, said in requests
        ]
        found = []
        for start in tqdm(range(0, len(sequences), AT_ONCE), desc="log-likelihoods", disable=disable_tqdm):
            found += evaluate.logps(self.model, sequences[start : start + AT_ONCE], self.batch_size)
        return [(total, greedy) for total, _, greedy in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, said in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, said))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += total
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for group in groups.values():
                given = normalize_gen_kwargs(requests[group[0]].args[1])
                stop = handle_stop_sequences(given.get("until"), eos=None)
                room = self.max_length - given["max_gen_toks"]
                if room < 1:
                    raise BadInput(
                        f"the task wants {given['max_gen_toks']} new tokens; the model's context is {self.max_length}"
                    )
                sampling = generation.Sampling(
                    temperature=given.get("temperature", 0.0) if given.get("do_sample") else 0.0,
                    top_k=given.get("top_k") or 0,
                    top_p=given.get("top_p") or 1.0,
                    seed=1234,
                )
                prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in group]
                how = self.batch_size, given["max_gen_toks"], sampling, [s for s in stop if s]
                for found in generation.answers(self.model, self.words, prompts, *how):
                    for n, answer in found.items():
                        texts[group[n]] = answer.text
                    bar.update(len(found))
        return texts


class Tasks:
    """The tasks that --tasks or --leaderboard name. Raises BadInput for one that lm-eval does not know."""

    def __init__(self, args: argparse.Namespace):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if args.include and not os.path.isdir(args.include):
            raise BadInput(f"--include {args.include}: no such folder")
        self.manager = TaskManager(include_path=args.include)
        self.names = list(evaluate.LEADERBOARD) if args.leaderboard else [n.strip() for n in args.tasks.split(",")]
        for name in self.names:
            if not self.manager.match_tasks([name]):
                raise BadInput(f"task {name!r} is unknown to lm-eval; --include names the folder of its YAML file")


def scores(
    model, tokenizer, template: str | None, tasks: Tasks, args: argparse.Namespace, found: dict, failed: list[str]
) -> None:
    """Add the scores to `found`, by task and metric, as they come; and to `failed` a line for each task that failed,
    which takes no other with it.
    """
    harness = Harness(model, tokenizer, template, args.batch_size)
    for name in tasks.names:
        shots, wanted = evaluate.LEADERBOARD[name] if args.leaderboard else (args.few_shot, None)
        try:
            results = evaluator.simple_evaluate(
                harness,
                tasks=[name],
                num_fewshot=shots,
                limit=args.limit,
                task_manager=tasks.manager,
                apply_chat_template=template is not None,
                log_samples=False,
                bootstrap_iters=0,
            )["results"]
        except Exception as error:  # of code and data that are not ours
            failed.append(f"task {name}: {type(error).__name__}: {error!s:.300}")
            continue
        for task, metrics in results.items():
            for metric, value in metrics.items():
                kind = metric.split(",")[0]
                asked = (task, kind) == (name, wanted) if wanted else not kind.endswith("_stderr")
                if isinstance(value, float) and asked:
                    found[f"{task}, {metric.removesuffix(',none')}"] = value
