"""Text to ids and back. Other tests import the tokenizers that are built here: no file of any model is needed."""

import json
import shutil
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from minichat.errors import BadInput
from minichat.tokenizer import TextStream, Tokenizer

CORPUS = [
    "### System:\nYou are a helpful assistant.",
    "### User:\nhello there, how are you? 1234 1999",
    "### Assistant:\nhello, hello! I am well.  Two  spaces. héllo élan",
    "[INST] say hello [/INST] hello</s>",
    "<|im_start|>user\nhello<|im_end|>\n<|system|>\n<|assistant|>",
    "a aa aaa    aaaa \n\n\n    def f(x):\n\treturn x",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
LOCAL = ["prepend", "newlines", "metaspace-first", "metaspace-always", "metaspace-split", "digits", "no-fallback"]
# the same, but that no token goes on from a word to the next, as in Mistral's vocabulary
WORDS = ["words-prepend", "words-split", "words-no-fallback"]
WORDS += ["words-metaspace-first", "words-metaspace-always", "words-metaspace-split"]
OTHER = ["byte-level", "byte-missing", "ignore-merges", "greedy-special", "normalized-special", "nfkc"]

# what a text of a chat is made of, and what its pieces could grow together with
PIECES = [
    "hello",
    " hello",
    "he",
    "llo",
    " ",
    "  ",
    "\n",
    "\n\n",
    "a",
    "aa",
    "1",
    "99",
    "é",
    "😀",
    "你好",
    "e\u0301",
    "\ufffd",
]
PIECES += [
    "<s>",
    "</s>",
    "</",
    "s>",
    "[INST]",
    "[/INST]",
    "###",
    "### User:",
    "<|im_end|>",
    ".",
    "▁",
    "\t",
    "\u200d",
    "ﬁ",
]
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=12))
generous = settings(deadline=None, max_examples=60)  # two shared cores


def backend(kind: str) -> Backend:
    """A BPE tokenizer like Mistral's ("prepend"), in other pipelines, or like GPT-2's ("byte-level")."""
    if kind == "byte-level":
        tokenizer = Backend(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        return tokenizer

    words, kind = kind.startswith("words-"), kind.removeprefix("words-")
    # in Mistral's vocabulary a line end is a byte and merges with nothing
    corpus = CORPUS if kind == "newlines" else [line for text in CORPUS for line in text.split("\n")]
    to_marks = [normalizers.Replace(" ", "▁")]
    trained = Backend(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *to_marks])
    if words:
        trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(corpus * 2, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256) if kind != "byte-missing" or byte != 0x98]
    vocabulary = dict.fromkeys([*SPECIAL, *byte_tokens, *model["vocab"]])
    vocabulary = {token: id for id, token in enumerate(vocabulary)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=kind != "no-fallback",
            ignore_merges=kind == "ignore-merges",
        )
    )
    metaspace = pre_tokenizers.Metaspace(
        prepend_scheme="always" if kind == "metaspace-always" else "first", split=kind == "metaspace-split"
    )
    if kind.startswith("metaspace"):
        tokenizer.pre_tokenizer = metaspace
    elif kind == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), metaspace])
    elif kind == "nfkc":
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+(?!\S)|\w+|."), "isolated")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *to_marks])
    if kind == "split":
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    greedy = kind == "greedy-special"
    normalized = kind == "normalized-special"
    tokenizer.add_special_tokens(
        [AddedToken(t, lstrip=greedy, rstrip=greedy, single_word=greedy, normalized=normalized) for t in SPECIAL]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write(folder: Path, kind: str = "prepend", **config) -> Path:
    """A model's folder with the tokenizer's files; `config` goes into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    backend(kind).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


backend_once = cache(backend)


@cache
def built(kind: str = "prepend") -> Tokenizer:
    """write() and open, once for all tests; the folder is not kept: nothing here needs it again."""
    folder = Path(mkdtemp())
    try:
        return Tokenizer(write(folder, kind))
    finally:
        shutil.rmtree(folder)


# ---- special tokens


def test_special_tokens(tmp_path):
    tokenizer = Tokenizer(write(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, (2,))
    assert tokenizer.add_bos and tokenizer.chat_template is None
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.vocab_size == max(backend("prepend").get_vocab().values()) + 1


def test_tokens_as_dicts_and_null(tmp_path):
    folder = write(tmp_path, bos_token=None, eos_token={"content": "</s>", "special": True}, pad_token="<unk>")
    (folder / "config.json").write_text('{"bos_token_id": 1}')
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.eos_id) == (None, False, 2)
    assert "bos_token" not in tokenizer.special_tokens


def test_ids_of_the_model_where_no_token_is_named(tmp_path):
    backend("prepend").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32000}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7, 99999]}')
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, (2, 7))


def test_special_tokens_map(tmp_path):
    backend("prepend").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize(
    "described, expected",
    [
        ({"2": {"content": "</s>", "special": True}}, ("<s>", "</s>", None)),
        ({}, ("<s>", "</s>", None)),
        (None, ("</s>", "<unk>", "<s>")),
    ],
)
def test_special_tokens_map_beside_the_config_is_read_as_in_transformers(described, expected, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path, **({} if described is None else {"added_tokens_decoder": described}))
    named = {"bos_token": "</s>", "eos_token": "<unk>", "pad_token": "<s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    ours, theirs = Tokenizer(tmp_path).special_tokens, transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tuple(map(ours.get, named)) == tuple(getattr(theirs, key) for key in named) == expected


def test_the_generation_config_comes_before_the_config(tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text('{"pad_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"pad_token_id": 6}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special_tokens["pad_token"] == tokenizer._tokenizer.id_to_token(6)


def test_add_bos(tmp_path):
    assert not Tokenizer(write(tmp_path / "a", add_bos_token=False)).add_bos
    assert not Tokenizer(write(tmp_path / "b", "byte-level")).add_bos  # nothing adds it
    assert Tokenizer(write(tmp_path / "c", "byte-level", add_bos_token=True)).add_bos


def test_pad_that_is_not_in_the_vocabulary_is_no_error(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "a", pad_token="[PAD]"))
    assert tokenizer.special_tokens["pad_token"] == "[PAD]"
    tokenizer.save(tmp_path / "b")
    assert "pad_token_id" not in json.loads((tmp_path / "b" / "generation_config.json").read_text())


def test_tokens_that_only_the_config_has(tmp_path):
    size = len(backend("prepend").get_vocab())
    described = {str(size + i): {"content": f"<|im_{x}|>", "special": True} for i, x in enumerate(("end", "start"))}
    tokenizer = Tokenizer(write(tmp_path, added_tokens_decoder=described, eos_token="<|im_end|>"))
    assert tokenizer.eos_id == size and tokenizer.encode("<|im_end|>") == [size]
    assert tokenizer.vocab_size == size + 2
    with pytest.raises(BadInput, match="leaves no such id"):
        Tokenizer(write(tmp_path, added_tokens_decoder={"9000": {"content": "<|far|>"}}))


def test_chat_template(tmp_path):
    assert Tokenizer(write(tmp_path, chat_template="{{ 1 }}")).chat_template == "{{ 1 }}"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert Tokenizer(write(tmp_path, chat_template=named)).chat_template == "d"
    assert Tokenizer(write(tmp_path, chat_template=named[:1])).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}\n")
    assert Tokenizer(tmp_path).chat_template == "{{ 2 }}\n"


# ---- errors


def test_errors(tmp_path):
    with pytest.raises(BadInput, match="tokenizer.json is not there"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BadInput, match=r"AutoTokenizer.from_pretrained\('.*'\).save_pretrained") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    for broken in ("{", "[]", "{}"):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(BadInput, match="is not a tokenizer"):
            Tokenizer(tmp_path)
    write(tmp_path)
    (tmp_path / "config.json").write_text("{'eos'")
    with pytest.raises(BadInput, match="config.json is not JSON"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BadInput, match="holds a list"):
        Tokenizer(tmp_path)


WRONG = {
    "eos is a number": ("tokenizer_config.json", {"eos_token": 0}, "eos_token is 0"),
    "bos is a list": ("special_tokens_map.json", {"bos_token": ["<s>"]}, "bos_token is ['<s>']"),
    "eos holds a number": ("tokenizer_config.json", {"eos_token": {"content": 2}}, "eos_token is 2"),
    "pad is half a character": ("special_tokens_map.json", {"pad_token": "\ud83d"}, r"pad_token is '\ud83d'"),
    "added tokens in a list": ("tokenizer_config.json", {"added_tokens_decoder": ["<s>"]}, "added_tokens_decoder"),
    "added token a string": ("tokenizer_config.json", {"added_tokens_decoder": {"3": "<s>"}}, "added_tokens_decoder"),
    "added token a number": ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": 1}}}, "maps no ids"),
    "added token without id": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "no ids"),
    "added token half a character": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"3": {"content": "\ud83d"}}},
        "maps no ids",
    ),
    "added token beyond counting": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
        "maps no ids",
    ),
    "template a number": ("tokenizer_config.json", {"chat_template": 1}, "chat_template is 1"),
    "named template a number": (
        "tokenizer_config.json",
        {"chat_template": [7, {"name": "default", "template": 1}]},
        "chat_template is 1",
    ),
    "eos id in words": ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id is 'x'"),
    "one eos id in words": ("config.json", {"eos_token_id": [2, "x"]}, "eos_token_id is [2, 'x']"),
    "pad id in words": ("config.json", {"pad_token_id": {"id": 0}}, "pad_token_id is {'id': 0}"),
}


@pytest.mark.parametrize("name, content, message", WRONG.values(), ids=WRONG)
def test_values_of_a_wrong_kind(tmp_path, name, content, message):
    write(tmp_path)
    if name != "tokenizer_config.json":
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    old = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    (tmp_path / name).write_text(json.dumps({**old, **content}))
    with pytest.raises(BadInput) as error:
        Tokenizer(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


FAILING = {  # each is well-formed, and the library panics or raises, on some text or other
    "panics when read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "panics on any text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "panics on some text": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": True}
    },
    "panics when it decodes": {"decoder": {"type": "Strip", "content": "a", "start": 9, "stop": 9}},
    "raises": {"model": {"type": "WordLevel", "vocab": {"<s>": 1, "</s>": 2}, "unk_token": "none"}},
    "ids without end": {"model": {"type": "BPE", "vocab": {"</s>": 4_000_000_000}, "merges": []}},
}


@pytest.mark.parametrize("change", FAILING.values(), ids=FAILING)
def test_what_the_library_fails_at_is_one_line(tmp_path, change):
    write(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(BadInput) as error:
        tokenizer = Tokenizer(tmp_path)
        ids = tokenizer.encode("a" * 40 + "!")
        tokenizer.encode_cut("a b", [1])
        tokenizer.decode(ids)
        stream = TextStream(tokenizer)
        "".join(map(stream.put, ids))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_ids_that_are_no_tokens_are_no_errors(tmp_path):
    """-1 is how some say that there is no padding; what is beyond the vocabulary is another tokenizer's."""
    write(tmp_path)
    (tmp_path / "config.json").write_text('{"pad_token_id": 99999, "bos_token_id": 1, "eos_token_id": [2, 99999, -1]}')
    (tmp_path / "generation_config.json").write_text('{"pad_token_id": -1, "eos_token_id": null}')
    tokenizer = Tokenizer(tmp_path)
    assert "pad_token" not in tokenizer.special_tokens and tokenizer.stop_ids == (2,)


def test_missing_special_tokens(tmp_path):
    with pytest.raises(BadInput, match="no end-of-text token"):
        Tokenizer(write(tmp_path, eos_token=None))
    with pytest.raises(BadInput, match="'<end>' is not in the vocabulary"):
        Tokenizer(write(tmp_path, eos_token="<end>"))


def test_rows_of_an_embedding_that_are_no_tokens_are_no_text():
    tokenizer = built()
    stream = TextStream(tokenizer)
    first, *rest = tokenizer.encode("hello there")
    ids = [first, tokenizer.vocab_size, *rest, 10**6, 10**12]
    assert "".join(map(stream.put, ids)) + stream.flush() == tokenizer.decode(ids) == "hello there"
    with pytest.raises(BadInput, match="negative"):
        tokenizer.decode([5, -1])


def test_text_that_is_no_unicode():
    with pytest.raises(BadInput, match=r"'a\\ud83d' is not Unicode"):
        built().encode("a\ud83d")


# ---- ids


@generous
@given(texts)
def test_encode(text):
    for kind in ("prepend", "byte-level"):
        tokenizer, reference = built(kind), backend_once(kind)
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids


def test_saved_truncation_and_padding_are_not_ours(tmp_path):
    saved = backend("prepend")
    saved.enable_truncation(3)
    saved.enable_padding(length=50)
    write(tmp_path)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("hello hello hello") == built().encode("hello hello hello")


@pytest.mark.parametrize("kind", [*LOCAL, *WORDS, *OTHER])
@generous
@given(parts=st.lists(texts, min_size=1, max_size=5))
def test_cuts(kind, parts):
    tokenizer = built(kind)
    assert tokenizer._cuts_are_local == (kind not in OTHER)
    assert (tokenizer._words is not None) == (kind in WORDS)
    text = "".join(parts)
    cuts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    ids, counts = tokenizer.encode_cut(text, cuts)
    assert (ids, counts) == tokenizer._encode_cut_by_cut(text, cuts)
    # the same whatever follows
    for cut, count, before in zip(cuts, counts, range(len(cuts))):
        assert tokenizer.encode_cut(text[:cut], cuts[:before]) == (ids[:count], counts[:before])
    # and nothing but the whole text's ids if the cuts do no harm
    whole = tokenizer.encode(text)
    if all(whole[:count] == tokenizer.encode(text[:cut]) for cut, count in zip(cuts, counts)):
        assert ids == whole


@pytest.mark.parametrize("kind", WORDS)
@generous
@given(pieces=st.lists(st.sampled_from([*PIECES, " there", " how", "are", " \n"]), max_size=40))
def test_ids_from_memory_are_the_librarys(kind, pieces):
    text = "".join(pieces)
    found = built(kind)._words(text, [])
    assert found == (None if "▁" in text else (backend_once(kind).encode(text, add_special_tokens=False).ids, []))


def test_words_beyond_the_memory(monkeypatch):
    monkeypatch.setattr("minichat.words.LARGEST", 3)
    monkeypatch.setattr("minichat.words.LONGEST", 8)
    tokenizer = built("words-prepend")
    text = " ".join(["hello there how are you", "a" * 20, *map(str, range(20))] * 2)
    assert tokenizer.encode_cut(text, [])[0] == tokenizer.encode(text)
    assert len(tokenizer._words._inner) <= 3 and all(len(word) <= 8 for word in tokenizer._words._inner)


def test_many_cuts_in_one_word_and_in_many_words():
    """What a long chat asks for, with spaces and without: once the library's own time, not once a cut."""
    tokenizer = built("words-prepend")
    for text in ("你好吗\n" * 6000, "hello there\n" * 6000):
        started = time.process_time()
        tokenizer.encode(text)
        once = time.process_time() - started
        cuts = list(range(12, len(text), 12))  # between lines
        started = time.process_time()
        tokenizer.encode_cut(text, cuts)
        assert time.process_time() - started < 30 * once + 1


def test_a_token_across_a_cut_is_split():
    tokenizer = built()
    assert len(tokenizer.encode("hello")) == 1
    ids, counts = tokenizer.encode_cut("hello", [2])
    assert ids[: counts[0]] == tokenizer.encode("he") and ids[counts[0] :] == tokenizer.encode("llo")


def test_encode_cut_is_fast_where_it_can_be():
    tokenizer = built()
    text = "hello there, how are you?</s>" * 1000
    started = time.process_time()
    tokenizer.encode(text)
    once = time.process_time() - started
    started = time.process_time()
    tokenizer.encode_cut(text, list(range(0, len(text), 29)))
    assert time.process_time() - started < 10 * once + 0.1  # the other way takes 1000 times as long


# ---- files


def test_save_copies_every_file(tmp_path):
    folder = write(tmp_path / "a", chat_template="{{ 1 }}")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text("{ }\n")
    (folder / "tokenizer.model").write_bytes(b"\x00\xff")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "chat_template.jinja").write_text("of another model")
    tokenizer = Tokenizer(folder)
    tokenizer.save(tmp_path / "b")
    tokenizer.save(folder)  # onto itself: nothing to do
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (
        files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} and len(files) == 6
    )  # and generation_config.json


STOPS = {
    "named": ({"eos_token": "</s>"}, {"eos_token_id": 2}, None, (2,)),
    "several": ({"eos_token": "</s>"}, {"eos_token_id": 2}, {"eos_token_id": [2, 300]}, (2, 300)),
    "by the model's id": ({}, {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}, None, (2,)),
    "by several ids": ({"eos_token": "</s>"}, {"eos_token_id": [7, 2]}, {"eos_token_id": 9}, (2, 9, 7)),
}


@pytest.mark.parametrize("template", [None, "{{ 1 }}"])
@pytest.mark.parametrize("names, model, generation, stop_ids", STOPS.values(), ids=STOPS)
def test_what_is_saved_knows_the_models_ids(tmp_path, names, model, generation, stop_ids, template):
    """Without config.json, which an adapter's folder does not have."""
    folder = write(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    (folder / "config.json").write_text(json.dumps(model))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer(folder)
    tokenizer.save(tmp_path / "b", chat_template=template)
    saved = Tokenizer(tmp_path / "b")
    assert saved.stop_ids == tokenizer.stop_ids == stop_ids
    assert (saved.bos_id, saved.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert saved.special_tokens == tokenizer.special_tokens
    tokenizer.save(tmp_path / "b", stop_ids=(2, 11))  # of a template that ends its answers with 11
    assert set(Tokenizer(tmp_path / "b").stop_ids) == {2, 11}
    tokenizer.save(tmp_path / "b", stop_ids=())
    assert Tokenizer(tmp_path / "b").stop_ids == stop_ids


def test_save_of_files_that_have_gone(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "a"))
    (tmp_path / "a" / "tokenizer.json").unlink()
    (tmp_path / "b").mkdir()
    with pytest.raises(BadInput, match="has gone"):
        tokenizer.save(tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_save_with_a_template(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "a", chat_template="{{ 1 }}", model_max_length=7))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ 2 }}")
    tokenizer.save(tmp_path / "b", chat_template="{{ 'é' }}")
    assert Tokenizer(tmp_path / "b").chat_template == "{{ 'é' }}"
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == {
        **json.loads((tmp_path / "a" / "tokenizer_config.json").read_text()),
        "chat_template": "{{ 'é' }}",
    }
    tokenizer.save(tmp_path / "a", chat_template="{{ 3 }}")
    assert Tokenizer(tmp_path / "a").chat_template == "{{ 3 }}"


@pytest.mark.parametrize("kind", ["prepend", "metaspace-first", "byte-level"])
def test_transformers_opens_what_we_save(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "a", kind)
    Tokenizer(tmp_path / "a").save(tmp_path / "b", chat_template="{{ bos_token }}")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "b"), Tokenizer(tmp_path / "b")
    assert theirs.chat_template == "{{ bos_token }}"
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    for text in [*CORPUS, "".join(PIECES), " ", ""]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        if "\ufffd" not in text:
            assert theirs.decode(ids) == ours.decode(ids, skip_special=False)


def test_save_without_a_tokenizer_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "a"
    folder.mkdir()
    backend("prepend").save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    Tokenizer(folder).save(tmp_path / "b", chat_template="{{ eos_token }}")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert (theirs.eos_token, theirs.bos_token, theirs.chat_template) == ("</s>", "<s>", "{{ eos_token }}")


def test_special_tokens_that_the_config_alone_names(tmp_path):
    """A plain word of the vocabulary that a file declares special, an end of text among them, and other flags."""
    transformers = pytest.importorskip("transformers")
    numbers = backend_once("prepend").get_vocab()
    word = next(token for token in sorted(numbers) if len(token) > 3 and token.isalpha())
    ends = {str(numbers[token]): {"content": token, "special": True} for token in ("<unk>", "<s>", "</s>")}
    strips = {"content": "<s>", "special": True, "rstrip": True, "lstrip": False, "normalized": False}
    cases = (
        {"added_tokens_decoder": {**ends, str(numbers[word]): {"content": word, "special": True, "normalized": False}}},
        {"added_tokens_decoder": {**ends, str(numbers["<s>"]): strips}},
        {"eos_token": word},
        {"extra_special_tokens": [word]},
    )
    for n, config in enumerate(cases):
        folder = write(tmp_path / str(n), **config)
        theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
        for text in (f"x{word}y", f" {word} a{word}", "<s> hello </s> a", *CORPUS[:3]):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), (config, text)
    eos = Tokenizer(tmp_path / "2")
    assert eos.eos_id == numbers[word] in eos.encode(f"a{word}") and eos.special_id(word) == eos.eos_id


def test_padding_that_only_the_model_numbers_is_text(tmp_path):
    """Of GPT's vocabulary 0 is "!", and pad_token_id is 0 where nobody set it."""
    folder = write(tmp_path, "byte-level")
    before = Tokenizer(folder)
    at = next(i for i in range(300) if before.decode([i], False).isalpha())
    letter = before.decode([at], False)
    (folder / "config.json").write_text(json.dumps({"pad_token_id": at}))
    after = Tokenizer(folder)
    assert after.special_id(letter) is None
    assert after.decode(after.encode(f"a{letter}b")) == f"a{letter}b"


def test_an_add_bos_token_of_null_is_none(tmp_path):
    assert Tokenizer(write(tmp_path, add_bos_token=None)).add_bos == built().add_bos is True


# ---- back to text


@generous
@given(text=texts.filter(lambda text: "▁" not in text and not any(token in text for token in SPECIAL)))
def test_decode_undoes_encode(text):
    for kind in ("prepend", "byte-level"):
        tokenizer = built(kind)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_cut_off_character_takes_no_other_with_it():
    tokenizer = built()
    ids = tokenizer.encode("😀😀")
    assert tokenizer.decode(ids) == "😀😀"
    assert tokenizer.decode(ids[:-1]) == "😀\ufffd"
    assert tokenizer.decode(ids[:-4]) == "😀"


@pytest.mark.parametrize("kind", [*LOCAL, *WORDS, "byte-missing", "byte-level"])
@generous
@given(data=st.data())
def test_stream_is_decode(kind, data):
    tokenizer = built(kind)
    anything = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20)
    byte_tokens = st.lists(st.integers(3, 258), max_size=8)  # of characters that are not there, mostly
    ids = data.draw(st.one_of(anything, texts.map(tokenizer.encode), st.builds(list.__add__, byte_tokens, anything)))
    stream = TextStream(tokenizer)
    text = "".join(stream.put(id) for id in ids) + stream.flush()
    assert text == tokenizer.decode(ids) == stream.text and not stream.stopped
    reference = backend_once(kind).decode(ids)
    if "\ufffd" not in reference:
        assert text == reference


@pytest.mark.parametrize("kind", ["prepend", "byte-level"])
@generous
@given(data=st.data())
def test_stop_strings(kind, data):
    """What is given ends before the first stop string to be completed, as if characters came one by one."""
    tokenizer = built(kind)
    text = tokenizer.decode(tokenizer.encode(data.draw(texts)))
    piece = st.tuples(st.integers(0, 30), st.integers(1, 6)).map(lambda at: text[at[0] : at[0] + at[1]]).filter(bool)
    stop = data.draw(st.lists(piece if text else st.just("x"), max_size=3)) + data.draw(
        st.lists(st.sampled_from(["hello", "\n\n", "llo a", "x"]), max_size=2)
    )
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    expected, stopped = decoded, False
    for end in range(len(decoded) + 1):
        found = [s for s in stop if decoded[:end].endswith(s)]
        if found:
            expected, stopped = decoded[: end - max(map(len, found))], True
            break
    stream = TextStream(tokenizer, stop)
    out = ""
    for id in ids:
        out += stream.put(id)
        assert expected.startswith(out)
    out += stream.flush()
    assert (out, stream.text, stream.stopped) == (expected, expected, stopped)
    assert stream.put(ids[0] if ids else 5) == "" or not stopped


def test_stop_string_across_tokens():
    tokenizer = built()
    stream = TextStream(tokenizer, ["lo the", "never"])
    assert [stream.put(id) for id in tokenizer.encode("hello there")][0] == "hel"
    assert stream.stopped and stream.flush() == "" and stream.text == "hel"


def test_held_text_comes_when_it_is_no_stop_string():
    tokenizer = built()
    stream = TextStream(tokenizer, ["\n\nUser"])
    given_text = [stream.put(id) for id in tokenizer.encode("a\n\na")]
    assert "\n" not in given_text[:-1] and "".join(given_text) == "a\n\na"


def test_flush_gives_what_is_held():
    tokenizer = built()
    stream = TextStream(tokenizer, ["lo!"])
    ids = [*tokenizer.encode("hello"), tokenizer.encode("😀")[1]]
    assert "".join(stream.put(id) for id in ids) == "hel"
    assert stream.flush() == "lo\ufffd" and stream.flush() == "" and stream.text == "hello\ufffd"


def test_special_tokens_are_left_out():
    tokenizer = built()
    ids = tokenizer.encode("<s>hello</s>")
    assert tokenizer.decode(ids) == "hello" and "</s>" in tokenizer.decode(ids, skip_special=False)
    stream = TextStream(tokenizer)
    assert "".join(map(stream.put, ids)) == "hello"


@pytest.mark.parametrize("stop", ["hello", [""], [1]])
def test_bad_stop_strings(stop):
    with pytest.raises(BadInput, match="list of strings that are not empty"):
        TextStream(built(), stop)


@pytest.mark.parametrize("text", ["hello there ", "😀", "\x98"])
def test_a_long_stream_costs_no_more_per_token(text):
    """Also where no character is ever complete."""
    tokenizer = built()
    ids = tokenizer.encode(text)
    if text == "\x98":
        ids = [tokenizer.encode("😀")[2]]  # a byte that continues a character which never began
    stream = TextStream(tokenizer, ["never said"])

    def seconds(tokens: int) -> float:
        started = time.process_time()
        for i in range(tokens):
            stream.put(ids[i % len(ids)])
        return time.process_time() - started

    first = seconds(2000)
    seconds(20000)
    assert seconds(2000) < 4 * first + 0.02
