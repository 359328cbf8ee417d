"""recipes/*.args against their cards: each runs on a tiny model, over records as its data set has them."""

import inspect
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from minichat import cli, int4, lora, optim, store, training

ROOT = Path(__file__).parent.parent
QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
ALL = QKVO | {"gate_proj", "up_proj", "down_proj"}
SLIMORCA = {
    "conversations": [
        {"from": "system", "value": "You are an AI assistant.", "weight": None},
        {"from": "human", "value": "How much is 1 + 2?", "weight": 0.0},
        {"from": "gpt", "value": "3", "weight": 1.0},
    ]
}
METAMATH = {"type": "GSM_AnsAug", "query": "How much is 1 + 2?", "original_question": "1 + 2?", "response": "It is 3."}
CHAT = [{"role": "user", "content": "How much is 1 + 2?"}, {"role": "assistant", "content": "3"}]
ULTRACHAT = {"prompt": "How much is 1 + 2?", "prompt_id": "f0e37e9f", "messages": CHAT * 2}
ORCA_PAIR = {"system": "You are an AI assistant.", "question": "1 + 2?", "chosen": "It is 3.", "rejected": "4"}
ULTRAFEEDBACK = {
    "prompt": "How much is 1 + 2?",
    "prompt_id": "0af7",
    "chosen": CHAT,
    "rejected": [CHAT[0], {"role": "assistant", "content": "4"}],
    "messages": CHAT,
    "score_chosen": 9.0,
    "score_rejected": 2.0,
}

# the cards' numbers; batch: of an optimiser step, over all of their devices
CARDS = {
    "neural-chat-v3-1-sft": {
        "script": "train.py", "record": SLIMORCA, "model": "mistralai/Mistral-7B-v0.1", "data": "Open-Orca/SlimOrca",
        "lora": (16, 64, 0.05, QKVO), "lr": 1e-4, "schedule": "cosine", "warmup": 0.03, "batch": 64, "epochs": 2,
        "length": 2560, "prompt": 1024, "template": "neuralchat",
    },
    "neural-chat-v3-1-dpo": {
        "script": "dpo.py", "record": ORCA_PAIR, "model": "runs/neural-chat-sft", "data": "Intel/orca_dpo_pairs",
        "lora": (16, 16, 0.05, QKVO - {"o_proj"}), "lr": 5e-4, "schedule": "cosine", "warmup": 100, "batch": 64,
        "steps": 1000, "length": 1536, "prompt": 1024, "beta": 0.1, "template": "neuralchat",
    },
    "neural-chat-v3-2": {
        "script": "train.py", "record": METAMATH, "model": "Intel/neural-chat-7b-v3-1", "data": "meta-math/MetaMathQA",
        "lora": (16, 64, 0.05, QKVO), "lr": 1e-4, "schedule": "cosine", "warmup": 0.03, "batch": 64, "epochs": 2,
        "length": 8192, "template": "neuralchat",
    },
    "zephyr-7b-sft-beta": {
        "script": "train.py", "record": ULTRACHAT, "model": "mistralai/Mistral-7B-v0.1",
        "data": "HuggingFaceH4/ultrachat_200k/train_sft", "eval_data": "HuggingFaceH4/ultrachat_200k/test_sft",
        "lr": 2e-5, "schedule": "cosine", "warmup": 0.1, "batch": 512, "epochs": 1, "length": 2048, "pack": 2048,
        "learn": "all", "template": "zephyr",
    },
    "zephyr-7b-beta-dpo": {
        "script": "dpo.py", "record": ULTRAFEEDBACK, "model": "runs/zephyr-sft",
        "data": "HuggingFaceH4/ultrafeedback_binarized/train_prefs",
        "eval_data": "HuggingFaceH4/ultrafeedback_binarized/test_prefs",
        "lr": 5e-7, "schedule": "linear", "warmup": 0.1, "batch": 32, "epochs": 3, "length": 1024, "prompt": 512,
        "beta": 0.1, "template": "zephyr",
    },
    "neuralhermes-2.5-dpo": {
        "script": "dpo.py", "record": ORCA_PAIR, "model": "teknium/OpenHermes-2.5-Mistral-7B",
        "data": "mlabonne/chatml_dpo_pairs", "lora": (16, 16, 0.05, ALL), "lr": 5e-5, "schedule": "cosine",
        "warmup": 100, "batch": 16, "steps": 200, "length": 1536, "prompt": 1024, "beta": 0.1, "int4": "nf4",
        "template": "chatml",
    },
    "laptop": {  # a card's but for what a smaller one makes it
        "script": "dpo.py", "record": ORCA_PAIR, "model": "teknium/OpenHermes-2.5-Mistral-7B",
        "data": "mlabonne/chatml_dpo_pairs", "lora": (16, 16, 0.05, ALL), "lr": 5e-5, "schedule": "cosine",
        "warmup": 100, "batch": 16, "steps": 200, "length": 1024, "prompt": 512, "beta": 0.1, "int4": True,
        "template": "chatml",
    },
}  # fmt: skip


def test_every_recipe_has_its_card():
    assert {file.stem for file in (ROOT / "recipes").glob("*.args")} == CARDS.keys() | {"base"}


def calls(monkeypatch, module, name):
    """The arguments of each call from now on, by name."""
    plain, seen = getattr(module, name), []

    def call(*args, **kwargs):
        bound = inspect.signature(plain).bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append(bound.arguments)
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return seen


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_is_its_card(name, base, tmp_path, monkeypatch):
    """Three steps of the script: what reaches adapter, encoder, schedule, optimiser and loss is the card's."""
    card = CARDS[name]
    record = card["record"]
    (tmp_path / "d.jsonl").write_text("".join(f"{json.dumps(record)}\n" for _ in range(8)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINICHAT_CACHE", str(tmp_path / "cache"))
    flags = ["--model", str(base), "--data", "d.jsonl", "--steps", "3", "--out", "out", "--dtype", "float32"]
    flags += ["--eval-data", "d.jsonl"] if "eval_data" in card else []
    flags += ["--group-size", "32"] if card.get("int4") == "nf4" else []  # the small model has widths of 96
    monkeypatch.setattr(sys, "argv", [card["script"], f"@{ROOT / 'recipes' / name}.args", *flags])
    attached, loaded = calls(monkeypatch, lora, "attach"), calls(monkeypatch, store, "load")
    rates, fitted = calls(monkeypatch, optim, "lr_at"), calls(monkeypatch, training, "fit")
    adamw, preferred = calls(monkeypatch, optim, "AdamW"), calls(monkeypatch, training.losses, "dpo_loss")
    runpy.run_path(str(ROOT / card["script"]), run_name="__main__")

    [fit], [optimizer] = fitted, adamw
    settings, model = fit["settings"], fit["model"]
    assert settings.batch_size * settings.accumulate == card["batch"]
    assert settings.pack == card.get("pack") and settings.seed == 42
    assert {(r["peak"], r["schedule"]) for r in rates} == {(card["lr"], card["schedule"])}
    assert settings.warmup == card["warmup"] and (settings.clip, settings.log_every) == (1.0, 10)
    if card["warmup"] >= 1:  # the third of 100 steps up
        assert optimizer_rate(out := tmp_path / "out") == pytest.approx(2 / card["warmup"] * card["lr"]), out
    assert optimizer["weight_decay"] == 0
    assert optimizer["betas"] == (0.9, 0.999) and optimizer["eps"] == 1e-8
    encoder = loaded[0]["encoder"]
    assert encoder.max_length == card["length"] and encoder.max_prompt_length == card.get("prompt")
    assert getattr(encoder, "learn", "assistant") == card.get("learn", "assistant")
    if "lora" in card:
        [adapter] = attached
        found = (adapter["r"], adapter["alpha"], adapter["dropout"], set(adapter["targets"]))
        assert found == card["lora"] and not adapter["rslora"]
    else:
        assert not attached and all(p.requires_grad for p in model.parameters())
    kind = card.get("int4") and ("nf4" if model.scheme.nf4 else True)
    assert kind == card.get("int4") and (model.scheme is None) == (kind is None)
    if card["script"] == "dpo.py":
        assert {(p["beta"], p["kind"], p["label_smoothing"]) for p in preferred} == {(card["beta"], "sigmoid", 0.0)}

    given = json.loads((tmp_path / "out" / "config.json").read_text())["flags"]
    assert given["template"] == card["template"]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2  # of steps 1 and 3


def optimizer_rate(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["lr"]


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_names_its_model_and_data(name, monkeypatch):
    """What the test above puts other files in the place of; and the steps."""
    card = CARDS[name]
    script = runpy.run_path(str(ROOT / card["script"]))
    monkeypatch.setattr(sys, "argv", [card["script"], f"@{ROOT / 'recipes' / name}.args"])
    args = script["parse"]()
    assert (args.model, args.data) == (card["model"], [card["data"]])
    assert args.eval_data == ([card["eval_data"]] if "eval_data" in card else None)
    assert args.steps == card.get("steps") and (args.steps or args.epochs == card["epochs"])
    if card.get("int4") == "nf4":  # groups that the small model above has no widths for
        assert cli.scheme(args) == int4.Scheme(group_size=64, nf4=True)
    assert args.save_every > 0 and args.dtype in ("bfloat16", None)


def test_the_recipe_of_the_embedded_base_is_taken(monkeypatch):
    parse = runpy.run_path(str(ROOT / "train.py"))["parse"]
    monkeypatch.setattr(sys, "argv", ["train.py", f"@{ROOT / 'recipes' / 'base.args'}"])
    args = parse()
    assert args.full and args.from_config and args.save_dtype == "bfloat16"


def test_docs_name_recipes_and_flags_that_are_there(monkeypatch):
    """Every command line in docs/recipes.md is one that its script takes."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    commands = re.findall(r"^python (.+?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(commands) > 12
    for line in (command.split() for command in commands):
        for word in line:
            assert not word.startswith("@") or (ROOT / word[1:]).exists(), word
        if line[0].endswith(".py"):
            script, flags = (ROOT / line[0]).read_text(), line[1:]
            known = script + (ROOT / "minichat" / "cli.py").read_text()
        else:
            assert line[0] == "-m"
            module = line[1].split(".")[1]
            known = (ROOT / "minichat" / f"{module}.py").read_text() + (ROOT / "minichat" / "cli.py").read_text()
            flags = line[2:]
        for flag in flags:
            assert not flag.startswith("--") or f'"{flag}"' in known, (flag, line)
    assert {f"recipes/{name}.args" for name in CARDS} <= set(re.findall(r"recipes/[\w.-]+?\.args", text))
