"""What the fields of a record mean. A format is one function and its line in a table."""

from collections.abc import Callable

from minichat.errors import BadInput

Messages = list[dict]

# the names that data sets give to the three roles
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
}


# ---- to learn from: record -> messages, or a text ----


def _messages(record: dict) -> Messages:
    if not isinstance(record["messages"], list):
        raise BadInput(f"'messages' is of type {type(record['messages']).__name__}; it must be a list of messages")
    if any(isinstance(message, dict) and message.get("tool_calls") for message in record["messages"]):
        raise BadInput("a message calls tools; minichat learns what is said, and would learn to say nothing")
    return record["messages"]


def _sharegpt(record: dict) -> Messages:
    """SlimOrca, ShareGPT: conversations of {"from": "human", "value": …}."""
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise BadInput(f"'conversations' is of type {type(turns).__name__}; it must be a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise BadInput(f"turn {i} is {turn!r:.80}; its 'from' must be one of {', '.join(ROLES)}")
        messages.append({"role": ROLES[speaker], "content": turn.get("value", turn.get("content"))})
    return messages


def _asked(record: dict, question: str, answer: str) -> Messages:
    """A question and its answer as they stand in two fields."""
    return [{"role": "user", "content": record[question]}, {"role": "assistant", "content": record[answer]}]


def _with_system(messages: Messages, record: dict) -> Messages:
    """Messages behind the system message that stands in a field of its own, if there is one and they have none. Most
    rows of some data sets have one, others an empty one: then there is none."""
    for field in ("system", "system_prompt"):
        if (said := record.get(field)) and _role(messages[0]) != "system":
            if not isinstance(said, str):
                raise BadInput(f"{field!r} is {said!r:.80}; it must be a string")
            return [{"role": "system", "content": said}, *messages]
    return messages


def _alpaca(record: dict) -> Messages:
    """Alpaca: an instruction, and perhaps an input that it speaks of."""
    instruction, given = record["instruction"], record.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(given, str):
        raise BadInput(f"'instruction' and 'input' are {instruction!r:.40} and {given!r:.40}; both must be strings")
    content = f"{instruction}\n\n{given}" if given else instruction
    return _asked({**record, "instruction": content}, "instruction", "output")


def _completion(record: dict) -> Messages:
    return [*_listed(record, "prompt", "user"), *_listed(record, "completion", "assistant")]


def _listed(record: dict, field: str, role: str) -> Messages:
    """A field that holds messages, or one of them as a string."""
    value = record[field]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadInput(f"{field!r} is of type {type(value).__name__}; it must be a string or a list of messages")
    return value


def _text(record: dict) -> str:
    if not isinstance(record["text"], str):
        raise BadInput(f"'text' is of type {type(record['text']).__name__}, not a string")
    return record["text"]


# name -> (the fields that tell it, the function); the first whose fields are all there is taken
CHATS: dict[str, tuple[tuple[str, ...], Callable[[dict], Messages | str]]] = {
    "chat": (("messages",), _messages),  # UltraChat
    "sharegpt": (("conversations",), _sharegpt),
    "metamath": (("query", "response"), lambda record: _asked(record, "query", "response")),
    "orca": (("question", "response"), lambda record: _asked(record, "question", "response")),
    "alpaca": (("instruction", "output"), _alpaca),
    "completion": (("prompt", "completion"), _completion),
    "text": (("text",), _text),
}


# ---- to prefer by: record -> prompt, chosen and rejected, as messages ----


def _intel(record: dict) -> tuple[Messages, Messages, Messages]:
    """Intel/orca_dpo_pairs."""
    return _answered([{"role": "user", "content": record["question"]}], record)


def _preference(record: dict) -> tuple[Messages, Messages, Messages]:
    """Strings or messages; a prompt in ChatML (chatml_dpo_pairs); answers that repeat the prompt (UltraFeedback)."""
    prompt = record["prompt"]
    if isinstance(prompt, str) and prompt.startswith("<|im_start|>"):
        return _chatml(record)
    if _repeats(record):
        return _implicit(record)
    return _answered(_listed(record, "prompt", "user"), record)


def _answered(prompt: Messages, record: dict) -> tuple[Messages, Messages, Messages]:
    answers = [_listed(record, side, "assistant") for side in ("chosen", "rejected")]
    for side, answer in zip(("chosen", "rejected"), answers):
        if not (answer and isinstance(answer[0], dict) and answer[0].get("role") == "assistant"):
            raise BadInput(f"{side!r} is {answer!r:.80}; it must begin with the assistant's answer to the prompt")
    return prompt, *answers


def _chatml(record: dict) -> tuple[Messages, Messages, Messages]:
    """A prompt written out in ChatML up to where the assistant begins, answers with their end."""
    prompt, end = [], "<|im_end|>"
    for turn in record["prompt"].removeprefix("<|im_start|>").split("<|im_start|>"):
        role, _, content = turn.partition("\n")
        prompt.append({"role": role, "content": content.rstrip("\n").removesuffix(end)})
    if prompt[-1] == {"role": "assistant", "content": ""}:
        prompt.pop()
    answers = {}
    for side in ("chosen", "rejected"):
        if not isinstance(record[side], str):
            raise BadInput(
                f"{side!r} is of type {type(record[side]).__name__}; beside a prompt in ChatML it must be a string"
            )
        text = record[side].rstrip("\n")
        answers[side] = text.removesuffix(end) if text.endswith(end) else record[side]
    return _answered(prompt, answers)


def _repeats(record: dict) -> bool:
    """Whether both answers are lists of messages that begin with what the user said."""
    sides = [record["chosen"], record["rejected"]]
    return all(isinstance(s, list) and s and isinstance(s[0], dict) and s[0].get("role") != "assistant" for s in sides)


def _implicit(record: dict) -> tuple[Messages, Messages, Messages]:
    """Two conversations: what both begin with is the prompt."""
    if not _repeats(record):
        raise BadInput("there is no 'prompt', and 'chosen' and 'rejected' are not two conversations that hold it")
    chosen, rejected = record["chosen"], record["rejected"]
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    # the answers may begin alike too: they begin with the assistant's turn
    while same and not all(len(s) > same and _role(s[same]) == "assistant" for s in (chosen, rejected)):
        same -= 1
    prompt = chosen[:same]
    asked = record.get("prompt")
    said = [message.get("content") for message in prompt if _role(message) == "user"]
    if not prompt or isinstance(asked, str) and asked not in said:
        raise BadInput(f"'chosen' and 'rejected' begin with {said!r:.80}, not with the prompt {asked!r:.80}")
    return _answered(prompt, {"chosen": chosen[same:], "rejected": rejected[same:]})


def _role(message) -> str | None:
    return message.get("role") if isinstance(message, dict) else None


PAIRS: dict[str, tuple[tuple[str, ...], Callable[[dict], tuple[Messages, Messages, Messages]]]] = {
    "preference": (("prompt", "chosen", "rejected"), _preference),
    "intel": (("question", "chosen", "rejected"), _intel),
    "implicit": (("chosen", "rejected"), _implicit),
}


def read(record: dict, table: dict, wanted: str | None = None):
    """What a record says, by the first format of `table` that its fields fit, or by the one called `wanted`.

    Raises BadInput naming the fields seen and the fields wanted, or what is wrong inside.
    """
    for name in [wanted] if wanted else table:
        fields, function = table[name]
        if all(field in record for field in fields):
            found = function(record)
            if isinstance(found, tuple):
                prompt, *answers = found
                return (_with_system(prompt, record), *answers) if prompt else found
            return _with_system(found, record) if isinstance(found, list) and found else found
    if table is CHATS and not wanted and "chosen" in record:
        raise BadInput("a preference pair; train.py learns from chats and texts, dpo.py from pairs")
    rule = " | ".join(" + ".join(table[name][0]) for name in ([wanted] if wanted else table))
    raise BadInput(f"fields {sorted(record)} fit no format; wanted: {rule}"[:400])
