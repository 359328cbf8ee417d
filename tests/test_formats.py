"""Records with the fields of the published data sets."""

import json

import pytest
from test_examples import SYSTEM, said, user

from minichat import chat
from minichat.cli import BASE
from minichat.errors import BadInput
from minichat.examples import Dpo, encode
from minichat.formats import CHATS, PAIRS, read
from minichat.tokenizer import Tokenizer

ASKED = [user("How much is 1 + 2?"), said("3")]

SAYS = {
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "How much is 1 + 2?", "weight": None},
                {"from": "gpt", "value": "3", "weight": 1.0},
            ]
        },
        [SYSTEM, *ASKED],
    ),
    "ShareGPT": ({"id": "a_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
                 [user("Hi"), said("Hello")]),
    "UltraChat": ({"prompt": "How much is 1 + 2?", "prompt_id": "f0e3", "messages": ASKED}, ASKED),
    "MetaMathQA": ({"type": "GSM_Rephrased", "query": "How much is 1 + 2?", "original_question": "?", "response": "3"},
                   ASKED),
    "OpenOrca": ({"id": "niv.1", "system_prompt": "Be brief.", "question": "How much is 1 + 2?", "response": "3"},
                 [SYSTEM, *ASKED]),
    "OpenOrca, no system": ({"id": "flan.1", "system_prompt": "", "question": "How much is 1 + 2?", "response": "3"},
                            ASKED),
    "Alpaca": ({"instruction": "How much is 1 + 2?", "input": "", "output": "3", "text": "Below is"}, ASKED),
    "Alpaca, input": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, [user("Add.\n\n1 and 2"), said("3")]),
    "Alpaca, null": ({"instruction": "How much is 1 + 2?", "input": None, "output": "3"}, ASKED),
    "completion": ({"prompt": "How much is 1 + 2?", "completion": "3"}, ASKED),
    "text": ({"text": "1 + 2 = 3"}, "1 + 2 = 3"),
}  # fmt: skip


@pytest.mark.parametrize("record, said", SAYS.values(), ids=SAYS)
def test_what_records_to_learn_from_say(record, said):
    assert read(record, CHATS) == said


@pytest.mark.parametrize(
    "name, role",
    [("system", "system"), *((name, "user") for name in ("human", "user")),
     *((name, "assistant") for name in ("gpt", "chatgpt", "bing", "bard", "model", "assistant"))],
)  # fmt: skip
def test_the_names_of_a_role(name, role):
    for turn in ({"from": name, "value": "a"}, {"role": name, "content": "a"}):
        assert read({"conversations": [turn]}, CHATS) == [{"role": role, "content": "a"}]


CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n\nthere<|im_end|>\n<|im_start|>assistant\n"
HELLO = [said("Hello")], [said("No")]
PREFERS = {
    "orca_dpo_pairs": (
        {"system": "Be brief.", "question": "Hi", "chosen": "Hello", "rejected": "No"},
        ([SYSTEM, user("Hi")], *HELLO),
    ),
    "orca_dpo_pairs, no system": (
        {"system": "", "question": "Hi", "chosen": "Hello", "rejected": "No"},
        ([user("Hi")], *HELLO),
    ),
    "chatml_dpo_pairs": (
        {"prompt": CHATML, "chosen": "Hello<|im_end|>\n", "rejected": "No<|im_end|>\n"},
        ([SYSTEM, user("Hi\n\nthere")], *HELLO),
    ),
    "UltraFeedback-binarized": (
        {
            "prompt": "Hi",
            "prompt_id": "0a1b",
            "chosen": [user("Hi"), said("Hello")],
            "rejected": [user("Hi"), said("No")],
            "messages": [user("Hi"), said("Hello")],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        ([user("Hi")], *HELLO),
    ),
    "chatml, answers without their end": (
        {"prompt": CHATML, "chosen": "Hello\n", "rejected": "No"},
        ([SYSTEM, user("Hi\n\nthere")], [said("Hello\n")], [said("No")]),
    ),
    "a prompt of messages": (
        {"prompt": [SYSTEM, user("Hi")], "chosen": [said("Hello")], "rejected": [said("No")]},
        ([SYSTEM, user("Hi")], *HELLO),
    ),
    "two conversations": (
        {"chosen": [SYSTEM, user("a"), said("b"), user("Hi"), said("Hello")],
         "rejected": [SYSTEM, user("a"), said("b"), user("Hi"), said("No")]},
        ([SYSTEM, user("a"), said("b"), user("Hi")], *HELLO),
    ),
    "two conversations, one longer": (
        {"chosen": [user("Hi"), said("Hello"), user("b"), said("c")], "rejected": [user("Hi"), said("Hello")]},
        ([user("Hi")], [said("Hello"), user("b"), said("c")], [said("Hello")]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("record, said", PREFERS.values(), ids=PREFERS)
def test_what_pairs_say(record, said):
    assert read(record, PAIRS) == said


def test_a_pair_in_chatml_has_the_ids_of_its_text(tmp_path):
    """NeuralHermes' recipe feeds the text as it stands: through messages and the template comes the same text."""
    tokenizer = Tokenizer(BASE)
    encoder = Dpo(tokenizer, chat.template_text("chatml", tokenizer), 500, 400)
    (pair,), _ = encode([("f:1", PREFERS["chatml_dpo_pairs"][0])], encoder)
    assert tokenizer.decode(pair.prompt + pair.chosen) == CHATML + "Hello<|im_end|>\n"
    assert tokenizer.decode(pair.prompt + pair.rejected) == CHATML + "No<|im_end|>\n"


WRONG = {
    "nothing known": (CHATS, {"a": 1}, "fields ['a'] fit no format"),
    "a pair to learn from": (CHATS, {"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo.py"),
    "a chat to prefer by": (PAIRS, {"messages": ASKED}, "fit no format; wanted: prompt + chosen + rejected | question"),
    "conversations a string": (CHATS, {"conversations": "a"}, "is of type str"),
    "a turn a string": (CHATS, {"conversations": ["a"]}, "turn 0 is 'a'"),
    "a tool's turn": (CHATS, {"conversations": [{"from": "tool", "value": "a"}]}, "must be one of"),
    "from a list": (CHATS, {"conversations": [{"from": ["human"], "value": "a"}]}, "must be one of"),
    "a system prompt in a list": (CHATS, {"system": ["a"], "messages": ASKED}, "'system' is ['a']"),
    "input a number": (CHATS, {"instruction": "a", "input": 5, "output": "b"}, "must be strings"),
    "instruction null": (CHATS, {"instruction": None, "output": "b"}, "must be strings"),
    "ChatML beside messages": (PAIRS, {"prompt": CHATML, "chosen": [said("a")], "rejected": "b"}, "must be a string"),
    "another prompt in the answers": (
        PAIRS,
        {"prompt": "Hi", "chosen": [user("Ho"), said("a")], "rejected": [user("Ho"), said("b")]},
        "not with the prompt 'Hi'",
    ),
    "conversations apart": (PAIRS, {"chosen": [user("a"), said("b")], "rejected": [user("c"), said("d")]}, "with []"),
    "conversations of one turn": (PAIRS, {"chosen": [user("a")], "rejected": [user("a")]}, "begin with []"),
    "strings without a prompt": (PAIRS, {"chosen": "a", "rejected": "b"}, "there is no 'prompt'"),
}  # fmt: skip


@pytest.mark.parametrize("table, record, message", WRONG.values(), ids=WRONG)
def test_what_fits_no_format_is_one_line(table, record, message):
    with pytest.raises(BadInput) as error:
        read(record, table)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_format_by_its_name():
    both = {"prompt": "a", "completion": "b", "text": "c"}
    assert read(both, CHATS) == [user("a"), said("b")] and read(both, CHATS, "text") == "c"
    with pytest.raises(BadInput, match="wanted: query [+] response$"):
        read(both, CHATS, "metamath")


@pytest.mark.parametrize("table", [CHATS, PAIRS], ids=["chats", "pairs"])
def test_every_format_is_reached_and_nothing_but_bad_input_is_raised(table):
    """Each format by the fields that tell it, with values of every wrong kind in them."""
    values = [
        None,
        True,
        5,
        1.5,
        "",
        "a",
        [],
        ["a"],
        [None],
        [[]],
        [{}],
        [{"role": "user"}],
        {},
        {"a": 1},
        json.loads("[" * 50 + "]" * 50),
    ]
    for name, (fields, _) in table.items():
        for value in values:
            for field in fields:
                record = {**{f: "a" for f in fields}, field: value}
                try:
                    content = read(record, table, name)
                except BadInput:
                    continue
                for messages in content if table is PAIRS else [content]:
                    if isinstance(messages, str):
                        continue
                    try:
                        chat.render(messages, "neuralchat", Tokenizer(BASE))
                    except BadInput:
                        continue
