"""Records to ids: what is read, what is refused, what is cut, and what is learnt."""

import json
import math
import random
from collections import Counter

import pytest
from test_tokenizer import built

from minichat import chat
from minichat.cli import BASE
from minichat.errors import BadInput
from minichat.examples import Dpo, Report, Sft, encode
from minichat.tokenizer import Tokenizer

TOKENIZER = Tokenizer(BASE)
EOS = TOKENIZER.eos_id


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


def numbered(*records):
    return [(f"f:{i}", record) for i, record in enumerate(records, 1)]


def checked(encoded):
    encoded[1].check()
    return encoded


def sft(*records, max_length=10_000, template="neuralchat", strict=False, **more):
    encoder = Sft(TOKENIZER, chat.template_text(template, TOKENIZER), max_length, **more)
    return checked(encode(numbered(*records), encoder, strict))


def dpo(*records, max_length=10_000, max_prompt_length=10_000, template="neuralchat", strict=False):
    encoder = Dpo(TOKENIZER, chat.template_text(template, TOKENIZER), max_length, max_prompt_length)
    return checked(encode(numbered(*records), encoder, strict))


def learnt(example):
    return TOKENIZER.decode([t for t, m in zip(example.ids, example.mask) if m], skip_special=False)


def text(ids):
    return TOKENIZER.decode(ids, skip_special=False)


def test_a_prompt_loses_its_beginning_to_max_prompt_length():
    turns = [user("one two three four five six seven"), said("eight nine")]
    [whole], _ = sft({"messages": turns})
    first = whole.mask.index(1)
    for longest in (first - 1, 5, 1):
        [cut], report = sft({"messages": turns}, max_prompt_length=longest)
        assert (cut.ids, cut.mask) == (whole.ids[first - longest :], whole.mask[first - longest :])
        assert report.counts["prompts cut on the left"] == 1
    [same], report = sft({"messages": turns}, max_prompt_length=first)
    assert same.ids == whole.ids and not report.counts


def test_an_end_that_nothing_comes_before_is_no_piece():
    [whole], _ = sft({"text": "one two three four"})
    pieces, report = sft({"text": "one two three four"}, max_length=len(whole) - 1)
    assert [e.ids for e in pieces] == [whole.ids[:-1]] and not report.counts["dropped: no target within --max-length"]


# ---- formats ----


def test_the_formats_of_sft_say_the_same():
    chats = [user("How much is 1 + 2?"), said("3")]
    found, report = sft(
        {"messages": chats, "prompt": "ignored", "prompt_id": "x"},
        {"prompt": "How much is 1 + 2?", "completion": "3"},
        {"prompt": chats[:1], "completion": chats[1:]},
    )
    assert found[0].ids == found[1].ids == found[2].ids == chat.render(chats, "neuralchat", TOKENIZER)[0]
    assert found[0].mask == found[1].mask == found[2].mask
    assert learnt(found[0]) == "3</s>"
    assert [e.where for e in found] == ["f:1", "f:2", "f:3"]
    assert report.kept == 3 and report.tokens == sum(map(len, found)) and not report.counts


def test_all_assistant_turns_are_learnt_or_everything():
    record = {"messages": [SYSTEM, user("a"), said("one"), user("b"), said("two")]}
    (one,), _ = sft(record)
    assert learnt(one) == "one</s>two</s>"
    (whole,), _ = sft(record, learn="all")
    assert whole.ids == one.ids and all(whole.mask)


def test_texts_are_learnt_whole_with_their_ends():
    (one,), _ = sft({"text": "Add 1 and 2"})
    expected = [TOKENIZER.bos_id] * TOKENIZER.add_bos + TOKENIZER.encode("Add 1 and 2") + [EOS]
    assert one.ids == expected and all(one.mask)


def test_the_formats_of_dpo_say_the_same():
    found, report = dpo(
        {"system": "Be brief.", "prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": [SYSTEM, user("Hi")], "chosen": [said("Hello")], "rejected": [said("No")]},
    )
    assert found[0].prompt == found[1].prompt == chat.prompt_ids([SYSTEM, user("Hi")], "neuralchat", TOKENIZER)
    for pair in found:
        assert pair.prompt + pair.chosen == chat.render([SYSTEM, user("Hi"), said("Hello")], "neuralchat", TOKENIZER)[0]
        assert pair.prompt + pair.rejected == chat.render([SYSTEM, user("Hi"), said("No")], "neuralchat", TOKENIZER)[0]
    assert text(found[0].chosen) == "Hello</s>"
    assert report.tokens == sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in found)


def test_an_empty_system_field_is_none():
    """Most rows of orca_dpo_pairs' kind have one, or an empty one."""
    record = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    (without, empty, null), _ = dpo(record, {**record, "system": ""}, {**record, "system": None})
    assert without.prompt == empty.prompt == null.prompt


DEEP = json.loads("[" * 300 + "]" * 300)
WRONG_SFT = {
    "no format": {"question": "a"},
    "half a completion": {"prompt": "a"},
    "a pair": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "messages null": {"messages": None},
    "messages a string": {"messages": "hello"},
    "messages an object": {"messages": user("a")},
    "messages empty": {"messages": []},
    "messages NaN": {"messages": math.nan},
    "messages of strings": {"messages": ["a"]},
    "messages of lists": {"messages": [["user", "a"]]},
    "messages deep": {"messages": DEEP},
    "role unknown": {"messages": [{"role": "tool", "content": "a"}]},
    "role a list": {"messages": [{"role": ["user"], "content": "a"}]},
    "no role": {"messages": [{"from": "human", "value": "a"}]},
    "no content": {"messages": [{"role": "user"}]},
    "content null": {"messages": [user("a"), said(None)]},
    "content a number": {"messages": [user(5), said("a")]},
    "content NaN": {"messages": [user(math.nan), said("a")]},
    "content in parts": {"messages": [user([{"type": "text", "text": "a"}]), said("a")]},
    "content deep": {"messages": [user(DEEP), said("a")]},
    "content half a character": {"messages": [user("\ud800"), said("a")]},
    "prompt a number": {"prompt": 5, "completion": "a"},
    "prompt null": {"prompt": None, "completion": "a"},
    "completion true": {"prompt": "a", "completion": True},
    "completion an object": {"prompt": "a", "completion": said("b")},
    "text null": {"text": None},
    "text a list": {"text": ["a"]},
    "text half a character": {"text": "\udfff"},
}


@pytest.mark.parametrize("record", WRONG_SFT.values(), ids=WRONG_SFT)
def test_a_record_that_is_wrong_deep_inside_is_named(record):
    with pytest.raises(BadInput, match=r"^f:2: ") as error:
        sft({"text": "fine"}, record, strict=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    found, report = sft({"text": "fine"}, record, {"text": "fine too"})  # dropped, and the rest goes on
    assert [e.where for e in found] == ["f:1", "f:3"] and report.kept == 2
    assert report.bad == [str(error.value)] and ", 1 bad" in str(report)


def test_a_wanted_format_is_kept_to():
    both = {"text": "a", "prompt": "b", "completion": "c"}
    (one,), _ = sft(both, format="text")
    assert text(one.ids).endswith("a</s>") and all(one.mask)
    with pytest.raises(BadInput, match="f:1.*messages"):
        sft(both, format="chat", strict=True)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
WRONG_DPO = {
    "no pair": {"messages": [user("a"), said("b")]},
    "prompt a number": {**PAIR, "prompt": 5},
    "prompt empty": {**PAIR, "prompt": []},
    "prompt null": {**PAIR, "prompt": None},
    "system a number": {**PAIR, "system": 5},
    "system a list": {**PAIR, "system": ["a"]},
    "chosen null": {**PAIR, "chosen": None},
    "chosen a number": {**PAIR, "chosen": 1.5},
    "chosen empty": {**PAIR, "chosen": []},
    "chosen of strings": {**PAIR, "chosen": ["b"]},
    "rejected an object": {**PAIR, "rejected": said("c")},
    # its ids would not begin with the prompt's: what stood for the answer would be cut out of the middle
    "the prompt again in the answer": {**PAIR, "chosen": [user("a"), said("b")]},
    "content deep": {**PAIR, "chosen": [said(DEEP)]},
}


@pytest.mark.parametrize("record", WRONG_DPO.values(), ids=WRONG_DPO)
def test_a_pair_that_is_wrong_deep_inside_is_named(record):
    with pytest.raises(BadInput, match=r"^f:2: ") as error:
        dpo(PAIR, record, strict=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    found, report = dpo(PAIR, record, PAIR)
    assert [p.where for p in found] == ["f:1", "f:3"] and report.bad == [str(error.value)]


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(BadInput, match="2 dropped: no assistant turn"):
        sft({"messages": [user("a")]}, {"messages": [SYSTEM, user("b")]})
    with pytest.raises(BadInput, match="1 dropped: equal"):
        dpo({**PAIR, "rejected": "b"})
    for read in (sft, dpo):
        with pytest.raises(BadInput, match="left to learn"):
            read()
        with pytest.raises(BadInput, match=r"2 bad.*; f:1: fields \['a'\]"):
            read({"a": 1}, {"b": 2})


def test_what_could_not_be_read_is_a_bad_record():
    records = [("f:1", BadInput("not JSON: cut off")), ("f:2", {"text": "a"})]
    encoder = Sft(TOKENIZER, "{{ messages }}", 100)
    found, report = encode(records, encoder)
    assert [e.where for e in found] == ["f:2"] and report.bad == ["f:1: not JSON: cut off"]
    with pytest.raises(BadInput, match="^f:1: not JSON: cut off$"):
        encode(records, encoder, strict=True)


def test_a_chat_without_an_answer_is_not_one_that_is_too_long():
    good, silent = {"messages": [user("a"), said("b")]}, {"messages": [user("a")]}
    late = {"messages": [user("a"), said("b"), user("c " * 50)]}  # dropping its oldest turn drops its only answer
    found, report = sft(good, silent, late, {"prompt": "a", "completion": [user("b")]}, max_length=40)
    assert [e.where for e in found] == ["f:1"]
    assert report.counts["dropped: no assistant turn"] == 2
    assert report.counts["dropped: no target within --max-length"] == 1
    found, report = sft(silent, learn="all")
    assert len(found) == 1 and not report.counts


# ---- what counts of a pair ----


def counted(pair):
    """The texts of chosen and rejected that count."""
    sides = zip((pair.chosen, pair.rejected), pair.masks)
    return [text([t for t, m in zip(ids, mask) if m]) for ids, mask in sides]


@pytest.mark.parametrize("template", ["neuralchat", "neuralchat-card", "mistral-instruct", "none"])
def test_an_answer_of_one_message_counts_whole(template):
    (pair,), _ = dpo({"prompt": "Hi", "chosen": "Hello you", "rejected": "No"}, template=template)
    assert all(pair.masks[0]) and all(pair.masks[1])
    assert counted(pair) == ["Hello you</s>", "No</s>"]


@pytest.mark.parametrize("template", ["neuralchat", "zephyr", "mistral-instruct", "none"])
def test_what_counts_of_an_answer_is_what_sft_learns_of_it(template):
    """Not what the user says in it, nor the template's text; but zephyr's line end after the last </s>, as in trl."""
    prompt, chosen = [user("Hi")], [said("Hello"), user("Bye?"), said("Bye")]
    (pair,), _ = dpo({"prompt": prompt, "chosen": chosen, "rejected": "No"}, template=template)
    (example,), _ = sft({"messages": prompt + chosen}, template=template)
    assert pair.prompt + pair.chosen == example.ids
    end = len(example.mask) - example.mask[::-1].index(1)
    mask = [0] * len(pair.prompt) + pair.masks[0]
    assert mask[:end] == example.mask[:end] and all(mask[end:])
    between, tail = " " * (template == "mistral-instruct"), " \n" * (template == "zephyr")
    assert counted(pair) == [f"Hello</s>{between}Bye</s>{tail}", f"No</s>{tail}"]


def test_chatmls_answers_end_with_their_line_as_in_its_recipe():
    """mlabonne's pairs for NeuralHermes: "…<|im_end|>\\n", all of it summed. Other turns have their text alone."""
    turns = [said("Hello"), user("Bye?"), said("Bye")]
    ours = chat.template_text("chatml", TOKENIZER)
    for template in ("chatml", ours.replace("{% generation %}\n", "").replace("{% endgeneration %}", "")):
        (pair,), _ = dpo({"prompt": "Hi", "chosen": turns, "rejected": "No"}, template=template)
        assert counted(pair) == ["Hello<|im_end|>Bye<|im_end|>\n", "No<|im_end|>\n"]
        (pair,), _ = dpo({"prompt": "Hi", "chosen": turns[:2], "rejected": "No"}, template=template)
        assert counted(pair) == ["Hello<|im_end|>", "No<|im_end|>\n"]


def test_a_pair_is_dropped_where_nothing_that_counts_is_left():
    """This template's own text begins the answer: there is room for that, and for no more."""
    template = (
        '{% for m in messages %}{% if m["role"] == "assistant" %}It said: {% generation %}{{ m["content"] }}'
        '{{ eos_token }}{% endgeneration %}{% else %}{{ m["content"] }}: {% endif %}{% endfor %}'
    )
    record = {**PAIR, "chosen": "5", "rejected": "6"}
    (pair,), _ = dpo(record, template=template)
    assert counted(pair) == ["5</s>", "6</s>"]
    P, before = len(pair.prompt), pair.masks[0].index(1)
    (cut,), _ = dpo(record, template=template, max_length=P + before + 2)  # the space and the digit
    assert cut.masks == ([0] * before + [1, 1],) * 2 and counted(cut) == ["5", "6"]
    other = template.replace("It said", '{{ m["content"] }}')  # so that the two differ before anything counts
    (pair,), _ = dpo(record, template=other)
    with pytest.raises(BadInput, match="1 dropped: equal or empty"):
        dpo(record, template=other, max_length=len(pair.prompt) + pair.masks[0].index(1))


# ---- truncation ----

TURNS = [SYSTEM, user("first"), said("one"), user("second"), said("two"), user("third"), said("three")]


def length(*messages):
    return len(chat.render(list(messages), "neuralchat", TOKENIZER)[0])


def test_the_oldest_turns_go_first_and_the_system_message_stays():
    for dropped in (0, 1, 2):
        kept = [SYSTEM, *TURNS[1 + 2 * dropped :]]
        (one,), report = sft({"messages": TURNS}, max_length=length(*kept))
        assert (one.ids, one.mask) == chat.render(kept, "neuralchat", TOKENIZER)
        assert report.counts == ({"oldest turns dropped": dropped} if dropped else {})
        assert report.tokens == length(*kept) and report.kept == 1
    (one,), report = sft({"messages": TURNS}, max_length=length(*TURNS) - 1)
    assert learnt(one) == "two</s>three</s>" and report.counts == {"oldest turns dropped": 1}


def test_a_last_prompt_that_is_too_long_loses_its_left():
    messages = [user("one two three four five six"), said("fine")]
    ids, mask = chat.render(messages, "neuralchat", TOKENIZER)
    (one,), report = sft({"messages": messages}, max_length=len(ids) - 9)
    assert (one.ids, one.mask) == (ids[9:], mask[9:])
    assert report.counts == {"prompts cut on the left": 1}


def test_an_answer_that_is_too_long_loses_its_right():
    """Never its beginning: the first token learnt is the answer's own first, after the prompt's last."""
    messages = [user("go"), said("one two three four five six seven")]
    ids, mask = chat.render(messages, "neuralchat", TOKENIZER)
    first = mask.index(1)
    (one,), report = sft({"messages": messages}, max_length=6)
    assert one.ids == ids[first - 1 : first + 5] and one.mask == [0, 1, 1, 1, 1, 1]
    assert report.counts == {"prompts cut on the left": 1, "answers cut on the right": 1}


def test_a_chat_of_which_all_is_learnt_is_cut_into_pieces():
    """As a text: nothing of it is left out."""
    messages = [SYSTEM, *[user("go"), said("one two three four five six seven")] * 5]
    ids, _ = chat.render(messages, "neuralchat", TOKENIZER)
    found, report = sft({"messages": messages}, max_length=6, learn="all")
    assert [t for e in found for t in e.ids] == ids[: len(ids) - (len(ids) % 6 == 1)]
    assert all(all(e.mask) for e in found) and report.counts == {"chats cut into pieces": 1}


def test_a_long_chat_loses_as_few_turns_as_make_it_fit(monkeypatch):
    """By the definition, turn by turn; and without rendering it once for each of them."""
    rng, rendered, render = random.Random(0), [], chat.render
    monkeypatch.setattr(chat, "render", lambda *args, **more: (rendered.append(1), render(*args, **more))[1])
    for turns in (1, 2, 3, 10, 200):
        chats = [SYSTEM] * rng.randrange(2)
        for _ in range(turns):
            chats += [user("go " * rng.randrange(1, 9)), said("one " * rng.randrange(1, 9))]
        whole = len(render(chats, "neuralchat", TOKENIZER)[0])
        for longest in (whole, whole - 1, whole // 2, 60):
            shorter, dropped = chats, 0
            while len(ids := render(shorter, "neuralchat", TOKENIZER)[0]) > longest and dropped < turns - 1:
                first = 1 if shorter[0] is SYSTEM else 0
                shorter, dropped = [*shorter[:first], *shorter[first + 2 :]], dropped + 1
            rendered.clear()
            [found], report = sft({"messages": chats}, max_length=longest)
            assert report.counts["oldest turns dropped"] == dropped and len(rendered) <= 10
            assert found.ids == ids or len(ids) > longest


def test_a_text_that_has_its_ends_already_gets_no_second_ones():
    tokenizer = built()
    assert tokenizer.add_bos
    encoder = Sft(tokenizer, chat.template_text("none", tokenizer), 100)
    bare, both, begun, ended = ("hello", "<s>hello</s>", "<s>hello", "hello</s>")
    found = [encoder({"text": text}, Counter())[0].ids for text in (bare, both, begun, ended)]
    assert found[0] == [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]
    assert all(ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 1 for ids in found)


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_a_system_message_in_a_field_of_its_own(field):
    """Whatever the format; one among the messages is the one, and an empty one is none."""
    asked, answered = user("How much is 1 + 2?"), said("3")
    sharegpt = [{"from": "human", "value": asked["content"]}, {"from": "gpt", "value": "3"}]
    records = (
        {"messages": [asked, answered]}, {"conversations": sharegpt}, {"query": asked["content"], "response": "3"},
        {"question": asked["content"], "response": "3"}, {"instruction": asked["content"], "output": "3"},
        {"prompt": asked["content"], "completion": "3"},
    )  # fmt: skip
    wanted = chat.render([SYSTEM, asked, answered], "neuralchat", TOKENIZER)[0]
    plain = chat.render([asked, answered], "neuralchat", TOKENIZER)[0]
    for record in records:
        assert sft({**record, field: "Be brief."})[0][0].ids == wanted
        assert sft({**record, field: ""})[0][0].ids == plain
    own = {"messages": [{**SYSTEM, "content": "Its own."}, asked, answered], field: "Be brief."}
    assert "Its own." in text(sft(own)[0][0].ids) and "Be brief." not in text(sft(own)[0][0].ids)
    answers = {"chosen": "3", "rejected": "4"}
    pairs = (
        {"prompt": asked["content"], **answers}, {"question": asked["content"], **answers},
        {"prompt": f"<|im_start|>user\n{asked['content']}<|im_end|>\n<|im_start|>assistant\n", **answers},
        {"chosen": [asked, answered], "rejected": [asked, said("4")]},
    )  # fmt: skip
    asked_first = chat.prompt_ids([SYSTEM, asked], "neuralchat", TOKENIZER)
    for record in pairs:
        assert dpo({**record, field: "Be brief."})[0][0].prompt == asked_first


def test_a_chat_that_calls_tools_is_refused():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    with pytest.raises(BadInput, match="calls tools"):
        sft({"messages": [user("a"), call]}, {"text": "fine"}, strict=True)


def test_a_text_that_is_too_long_is_cut_into_pieces():
    ids = sft({"text": "1 + 2 = 3, 4 + 5 = 9"})[0][0].ids
    found, report = sft({"text": "1 + 2 = 3, 4 + 5 = 9"}, {"text": "1"}, max_length=7)
    pieces = [e.ids for e in found if e.where == "f:1"]
    assert [t for piece in pieces for t in piece] == ids[: len(ids) - (len(ids) % 7 == 1)]
    assert all(len(piece) == 7 for piece in pieces[:-1])
    assert report.counts["texts cut into pieces"] == 1 and report.kept == len(found)


def test_report_reads_as_a_line():
    report = Report(1234, 56789)
    report.counts["oldest turns dropped"] = 2
    assert str(report) == "1,234 records, 56,789 tokens, 2 oldest turns dropped"


def test_a_report_names_so_many_bad_records_and_counts_all(monkeypatch):
    monkeypatch.setattr("minichat.examples.SHOWN", 3)
    one, two = (encode(numbered(*[{"a": 1}] * n, {"text": "a"}), Sft(TOKENIZER, "{{ 1 }}", 9))[1] for n in (2, 4))
    assert (len(one.bad), len(two.bad), two.refused) == (2, 3, 4)
    tokens = one.tokens
    one.add(two)
    assert (one.kept, one.tokens, one.refused, len(one.bad)) == (2, 2 * tokens, 6, 3)
    assert one.bad[2] == two.bad[0] and str(one).endswith("6 bad")


def test_pairs_are_cut_as_the_recipes_say():
    """The prompt keeps its last tokens, the answers their first: 1024 and 1536 in the recipes."""
    record = {"prompt": "one two three four five", "chosen": "yes yes yes yes yes", "rejected": "no"}
    (full,), report = dpo(record)
    assert not report.counts
    P, C, R = len(full.prompt), len(full.chosen), len(full.rejected)
    assert C > R + 2
    (pair,), report = dpo(record, max_prompt_length=P - 3)
    assert (pair.prompt, pair.chosen, pair.rejected) == (full.prompt[3:], full.chosen, full.rejected)
    assert report.counts == {"prompts cut on the left": 1}
    (pair,), report = dpo(record, max_length=P + R + 1)
    assert (pair.prompt, pair.chosen, pair.rejected) == (full.prompt, full.chosen[: R + 1], full.rejected)
    assert report.counts == {"answers cut on the right": 1}
    (pair,), report = dpo(record, max_length=P - 3 + 2, max_prompt_length=P - 3)
    assert (pair.prompt, pair.chosen, pair.rejected) == (full.prompt[3:], full.chosen[:2], full.rejected[:2])
    assert report.counts["answers cut on the right"] == 1 + (R > 2)


def test_equal_pairs_are_dropped_also_when_cutting_made_them_equal():
    same = {"prompt": "a", "chosen": "one two three", "rejected": "one two four"}
    found, report = dpo(PAIR, {**PAIR, "rejected": "b"})
    assert [p.where for p in found] == ["f:1"] and report.kept == 1
    assert report.counts == {"dropped: equal or empty answers": 1}
    P = len(dpo(same)[0][0].prompt)
    found, report = dpo({**same, "rejected": "5"}, same, max_length=P + 1)
    assert [p.where for p in found] == ["f:1"] and report.counts["dropped: equal or empty answers"] == 1


def test_a_prompt_that_fills_the_length_leaves_no_pair():
    P = len(dpo(PAIR)[0][0].prompt)
    for limit in (P, P - 1, 1):
        with pytest.raises(BadInput, match="1 dropped: the prompt fills --max-length"):
            dpo(PAIR, max_length=limit)
