"""Text to token ids and back, over the Hugging Face `tokenizers` library; and text from a stream of ids."""

import codecs
import hashlib
import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path

from minichat import words
from minichat.errors import BadInput, brief
from minichat.files import read_json, write_json

TEMPLATE_FILE = "chat_template.jinja"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    TEMPLATE_FILE,
)
LARGEST = 1 << 20  # ids: `tokenizers` goes through all up to the largest; those in use have up to 900,000


class Tokenizer:
    """The tokenizer of a model's folder in Hugging Face format. tokenizer.json alone decides what the ids are.

    bos_id: int or None; eos_id: int; stop_ids: every id that ends an answer, eos_id first; special_tokens:
    {"bos_token": "<s>", …} as chat templates see them; chat_template: Jinja text or None; add_bos: whether this
    tokenizer begins plain text with BOS.
    Raises BadInput if files are missing, corrupt or contradict each other.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._tokenizer = _load(self.folder)
        config = read_json(self.folder / "tokenizer_config.json", missing={})
        self._add_tokens(config.get("added_tokens_decoder") or {})
        self.vocab_size: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        if self.vocab_size > LARGEST:
            raise BadInput(
                f"{self.folder / 'tokenizer.json'} has a token of id {self.vocab_size - 1}; ids are below {LARGEST}"
            )
        # the token files name tokens, the model's files number them; the tokenizer's own word comes first, and a null
        # there is a word too: some models have a bos_token_id in config.json and no BOS
        names = config
        if "added_tokens_decoder" not in config:  # as in transformers: of the older file, written before that one
            names = {**config, **read_json(self.folder / "special_tokens_map.json", missing={})}
        model = read_json(self.folder / "config.json", missing={})
        generation = read_json(self.folder / "generation_config.json", missing={})
        self.special_tokens: dict[str, str] = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            ids = [id for id in self._ids(f"{key}_id", generation, model) if 0 <= id < self.vocab_size]
            token = names[key] if key in names else self._tokenizer.id_to_token(ids[0]) if ids else None
            if isinstance(token, dict):
                token = token.get("content")
            if not _is_text(token) and token is not None:
                raise BadInput(f"{key} is {token!a} in {self.folder}'s files; it must be a token's text, or null")
            if token is not None:
                self.special_tokens[key] = token
        self._add_special_tokens(names)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        self.bos_id: int | None = self._id("bos_token")
        eos_id = self._id("eos_token")
        if eos_id is None:
            raise BadInput(
                f"{self.folder} names no end-of-text token, so no model could learn to stop; "
                'add "eos_token" to its tokenizer_config.json'
            )
        self.eos_id: int = eos_id
        stops = [eos_id, *self._ids("eos_token_id", generation, model)]
        # an id beyond the vocabulary is a leftover of another tokenizer
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(id for id in stops if 0 <= id < self.vocab_size))

        with _refused(self.folder):
            adds_bos = self.bos_id is not None and self._tokenizer.encode("a").ids[:1] == [self.bos_id]
        said = config.get("add_bos_token")
        self.add_bos: bool = self.bos_id is not None and bool(adds_bos if said is None else said)
        self._pieces: dict[int, bytes] = {}  # filled by _piece
        self.chat_template: str | None = self._find_template(config.get("chat_template"))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens written in it are parsed as such; none is added."""
        return self._encode(text).ids

    def encode_cut(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """The ids of `text`, and how many of them lie before each of the ascending character offsets `cuts`.

        Whatever follows a cut, the ids before it are the same: a prompt's ids begin the ids of prompt and answer.
        ids(text[:cut n]) are ids(text[:cut n-1]), and then the rest of encode(text[:cut n]) where that begins with
        them, else encode(text[cut n-1:cut n]) by itself. The end of the text is the last cut.
        """
        if not self._cuts_are_local:
            return self._encode_cut_by_cut(text, cuts)
        # Merges never cross a boundary that is there at the end, so what lies before it was merged as if alone:
        # where no token straddles a cut, the ids of the whole text already are the ids defined above.
        found = self._words and self._words(text, cuts)
        if found:
            return found
        encoding = self._encode(text)
        spans = encoding.offsets
        starts = [start for start, _ in spans]
        counts = [bisect_left(starts, cut) for cut in cuts]
        if any(count and spans[count - 1][1] > cut for count, cut in zip(counts, cuts)):
            return self._encode_cut_by_cut(text, cuts)
        return encoding.ids, counts

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD, but take no whole character with them; ids beyond
        the vocabulary are no text: an embedding may be padded with rows that no token has.
        """
        if min(ids, default=0) < 0:
            raise BadInput(f"id {min(ids)} is negative; ids of tokens are 0 or more")
        ids = [id for id in ids if id < self.vocab_size]
        text = self._decode(ids, skip_special)
        if "\ufffd" not in text:
            return text
        # `tokenizers` gives up a whole run of byte tokens when one character in it is cut off
        kept = [id for id in ids if not (skip_special and id in self._special_ids)]
        pieces = [self._piece(id, first=i == 0) for i, id in enumerate(kept)]
        return b"".join(pieces).decode("utf-8", "replace")

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`; None if there is none."""
        id = self._tokenizer.token_to_id(text)
        return id if id in self._special_ids else None

    def save(self, folder: Path, chat_template: str | None = None, stop_ids: Sequence[int] | None = None) -> None:
        """Copy the tokenizer's files to `folder` byte for byte, and write generation_config.json, so that what the
        model's own files say of ids is known without them.

        A `chat_template` takes the place of the model's own; it goes into tokenizer_config.json, which every release
        of transformers reads. stop_ids: what ends an answer, instead of the tokenizer's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "tokenizer.json").is_file():
            raise BadInput(f"{self.folder / 'tokenizer.json'} has gone since it was read")
        if folder.resolve() != self.folder.resolve():
            for name in FILES:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)  # of the tokenizer that was here before
        stops = list(stop_ids or self.stop_ids)
        pad_id = self._tokenizer.token_to_id(self.special_tokens.get("pad_token", ""))
        ids = {"bos_token_id": self.bos_id, "eos_token_id": stops if len(stops) > 1 else stops[0]}
        ids["pad_token_id"] = pad_id
        write_json(folder / "generation_config.json", {key: id for key, id in ids.items() if id is not None})
        if chat_template is not None:
            config = read_json(self.folder / "tokenizer_config.json", missing={})
            config = config or {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
            write_json(folder / "tokenizer_config.json", {**config, "chat_template": chat_template})
            (folder / TEMPLATE_FILE).unlink(missing_ok=True)  # it would come first

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids of a text."""
        known = [self._tokenizer.to_str(), self.bos_id, self.eos_id, self.add_bos, self.special_tokens]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def _encode(self, text: str):
        with _refused(self.folder):
            try:
                return self._tokenizer.encode(text, add_special_tokens=False)
            except (TypeError, UnicodeEncodeError) as error:
                raise BadInput(f"{text!a:.80} is not Unicode text (a lone surrogate?); repair the record") from error

    def _decode(self, ids: list[int], skip_special: bool = False) -> str:
        with _refused(self.folder):
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def _encode_cut_by_cut(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """encode_cut() by its definition: right for any tokenizer, and quadratic in the number of cuts."""
        ids: list[int] = []
        counts = []
        before = 0
        for cut in [*cuts, len(text)]:
            if cut > before:
                longer = self.encode(text[:cut])
                ids = longer if longer[: len(ids)] == ids else ids + self.encode(text[before:cut])
                before = cut
            counts.append(len(ids))
        return ids, counts[:-1]

    @cached_property
    def _cuts_are_local(self) -> bool:
        """Whether each character's tokens depend on others through BPE merges alone, so that encode_cut may be fast."""
        config, model = self._pipeline, self._pipeline["model"]
        plain_model = model.get("type") == "BPE" and not any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        )
        # with a byte missing, the library writes an unknown token after the byte tokens that follow it
        all_bytes = all(self._tokenizer.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
        plain_model = plain_model and (all_bytes or not model.get("byte_fallback"))
        plain_tokens = not any(
            token[key] for token in config["added_tokens"] for key in ("single_word", "lstrip", "rstrip", "normalized")
        )

        def one_character(step: dict) -> bool:
            return len(step["pattern"].get("String", "")) == 1

        def local(step: dict | None) -> bool:
            kind = step and step["type"]
            if kind == "Sequence":
                return all(local(inner) for inner in step.get("normalizers", step.get("pretokenizers")))
            return kind in (None, "Prepend", "Metaspace", "Digits") or (
                kind in ("Replace", "Split") and one_character(step)
            )

        return plain_model and plain_tokens and local(config["normalizer"]) and local(config["pre_tokenizer"])

    @cached_property
    def _words(self) -> words.Words | None:
        """The memory of words, where they do not depend on each other."""
        if not words.are_alone(self._pipeline, self._tokenizer.get_vocab()):
            return None
        return words.Words(self._encode, [token["content"] for token in self._pipeline["added_tokens"]])

    @cached_property
    def _decoders(self) -> set[str]:
        decoder = self._pipeline["decoder"] or {}
        return {step["type"] for step in decoder.get("decoders", [decoder]) if step}

    @cached_property
    def _pipeline(self) -> dict:
        """tokenizer.json without its vocabulary."""
        with _refused(self.folder):
            pipeline = json.loads(self._tokenizer.to_str())
        for key in ("vocab", "merges"):
            pipeline["model"].pop(key, None)
        return pipeline

    @cached_property
    def _anchor(self) -> tuple[int, int]:
        """A token to put before another, to see how that one reads in the middle of a text; and its length there."""
        for id in range(self.vocab_size):
            text = self._decode([id], skip_special=True)
            if text.strip() and "\ufffd" not in text and id not in self._special_ids:
                return id, len(text)
        raise BadInput(f"{self.folder} has no token with any text; is its tokenizer.json complete?")

    def _piece(self, id: int, first: bool) -> bytes:
        """The UTF-8 bytes that token `id` adds to a text; as its `first` token, whose dummy space is dropped."""
        if not first and id in self._pieces:
            return self._pieces[id]
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoders:
            table = _byte_level()
            known = all(c in table for c in token)
            piece = bytes(table[c] for c in token) if known else token.encode()
        elif "ByteFallback" in self._decoders and _is_byte(token):
            piece = bytes([int(token[3:5], 16)])
            if first and piece == b" ":
                piece = self._decode([id]).encode()
        elif first:
            piece = self._decode([id]).encode()
        else:
            anchor, length = self._anchor
            piece = self._decode([anchor, id])[length:].encode()
        if not first:
            self._pieces[id] = piece
        return piece

    def _ids(self, key: str, *configs: dict) -> list[int]:
        """The ids that the model's files give for `key`: one, several or none in each."""
        found = []
        for config in configs:
            value = config.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
                raise BadInput(f"{key} is {value!r} in {self.folder}'s files; it must be a token's id, or null")
            found += ids
        return found

    def _id(self, key: str) -> int | None:
        token = self.special_tokens.get(key)
        id = None if token is None else self._tokenizer.token_to_id(token)
        if token is not None and id is None:
            raise BadInput(
                f"{key} {token!r} is not in the vocabulary of {self.folder}/tokenizer.json; "
                "copy tokenizer.json and tokenizer_config.json from the same model"
            )
        return id

    def _add_tokens(self, described: dict[str, dict]) -> None:
        """Add what tokenizer_config.json has of tokens beyond tokenizer.json, or otherwise, as transformers does."""
        from tokenizers import AddedToken

        well = isinstance(described, dict) and all(
            id.isdecimal() and len(id) < 10 and isinstance(token, dict) and _is_text(token.get("content"))
            for id, token in described.items()
        )
        if not well:
            raise BadInput(f"{self.folder / 'tokenizer_config.json'}: added_tokens_decoder maps no ids to tokens")
        for id, token in sorted(described.items(), key=lambda item: int(item[0])):
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            new = AddedToken(token["content"], **{f: bool(token[f]) for f in flags if f in token})
            known = self._tokenizer.token_to_id(token["content"])
            if known is None or known == int(id) and self._tokenizer.get_added_tokens_decoder().get(known) != new:
                self._tokenizer.add_tokens([new])
                if self._tokenizer.token_to_id(token["content"]) != int(id):
                    raise BadInput(
                        f"token {token['content']!r} has id {id} in {self.folder}/tokenizer_config.json, and "
                        "tokenizer.json leaves no such id; copy both files from the same model"
                    )

    def _add_special_tokens(self, names: dict) -> None:
        """Tokens that the files name as special, and that are a plain part of the vocabulary: text is not cut through
        them, as in transformers, and what a template writes is the one token."""
        extra = [names.get(key) or () for key in ("additional_special_tokens", "extra_special_tokens")]
        extra = [token for some in extra for token in (some.values() if isinstance(some, dict) else some)]
        texts = [token.get("content") if isinstance(token, dict) else token for token in extra]
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        own = [text for key, text in self.special_tokens.items() if names.get(key) or key in ("bos_token", "eos_token")]
        for text in (*own, *texts):  # not what the model's files number as padding, which may be any character
            if _is_text(text) and text not in added and self._tokenizer.token_to_id(text) is not None:
                self._tokenizer.add_special_tokens([text])

    def _find_template(self, configured: str | list | None) -> str | None:
        path = self.folder / TEMPLATE_FILE
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}: not UTF-8 text: {error}") from None
        if isinstance(configured, list):
            named = [entry for entry in configured if isinstance(entry, dict) and entry.get("name") == "default"]
            configured = named[0].get("template") if named else None
        if not isinstance(configured, str | None):
            raise BadInput(f"{self.folder / 'tokenizer_config.json'}: chat_template is {configured!r:.80}, not text")
        return configured


class TextStream:
    """The text of ids that come one by one: put() gives what can be printed, and stopped says that a stop string came.

    Never half a character; never the beginning of a stop string that may yet be completed, nor anything from a
    completed one on. All that put() and flush() give is tokenizer.decode(ids) if no stop string comes; special
    tokens are left out. A put() costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str] | tuple[str, ...] = ()):
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise BadInput(f"stop is {stop!r}; it must be a list of strings that are not empty")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = list(stop)
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # the longest end of the text that begins a stop string
        self._emitted: list[str] = []

    @property
    def text(self) -> str:
        """All that was given so far."""
        return "".join(self._emitted)

    def put(self, id: int) -> str:
        """The text that token `id` lets us print, perhaps none."""
        if self.stopped or id in self._tokenizer._special_ids or id >= self._tokenizer.vocab_size:
            return ""
        piece = self._tokenizer._piece(id, first=self._first)
        self._first = False
        return self._emit(self._utf8.decode(piece))

    def flush(self) -> str:
        """The text still held, when no more ids come; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        given = self._emit(self._utf8.decode(b"", final=True))
        rest = "" if self.stopped else self._held
        self._held = ""
        self._emitted.append(rest)
        return given + rest

    def _emit(self, new: str) -> str:
        text = self._held + new
        found = [(text.find(stop) + len(stop), len(stop)) for stop in self._stop if stop in text]
        if found:
            end, length = min(found, key=lambda f: (f[0], -f[1]))  # the first to be completed, however tokens fall
            self.stopped = True
            self._held, given = "", text[: end - length]
        else:
            keep = 0
            for stop in self._stop:
                longest = min(len(stop) - 1, len(text))
                keep = max(keep, next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0))
            self._held, given = text[len(text) - keep :], text[: len(text) - keep]
        self._emitted.append(given)
        return given


def _load(folder: Path):
    """tokenizers.Tokenizer of a folder. Raises BadInput with the way out."""
    import tokenizers

    path = folder / "tokenizer.json"
    with _refused(folder):  # a folder that may not be searched
        found = path.is_file()
    if not found:
        if (folder / "tokenizer.model").is_file():
            raise BadInput(
                f"{folder} has tokenizer.model but no tokenizer.json; convert it once: python -c "
                f'"from transformers import AutoTokenizer; '
                f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
        raise BadInput(f"{path} is not there; --model must be a folder in Hugging Face format with a tokenizer")
    with _refused(folder):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # left over from whoever saved it: a shorter or longer text than asked for
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """What `tokenizers` raises inside, as BadInput: nothing narrower than Exception, and its panics not even that."""
    try:
        yield
    except BadInput:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"{folder / 'tokenizer.json'} is not a tokenizer ({brief(error)}); download it again") from error


def _is_text(value: object) -> bool:
    """Whether it is a string of whole characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


@cache
def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary (GPT-2) stands for.

    Printable bytes stand for themselves, the others are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
