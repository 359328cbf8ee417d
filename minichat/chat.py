"""Messages to token ids and the mask of what is learnt; chat templates, ours and other people's.

A message is {"role": "system" | "user" | "assistant", "content": str}. A template is Jinja text, as in transformers,
with {% generation %}…{% endgeneration %} round what the assistant says. Ours are below; to add one, add its text.
"""

import functools
import os
from bisect import bisect_left, bisect_right
from pathlib import Path

from minichat import sandbox
from minichat.errors import BadInput
from minichat.sandbox import short
from minichat.tokenizer import Tokenizer

Message = dict[str, str]

# As trained (Intel/neural-chat-7b-v3-1 and its training code): no BOS, </s> after every part.
_NEURALCHAT = """\
{% if messages[0]["role"] != "system" %}
### System:
You are a helpful, respectful and honest assistant.{{ eos_token }}
{% endif %}
{% for message in messages %}
{% if message["role"] == "assistant" %}
### Assistant:
{% generation %}
{{ message["content"] }}{{ eos_token }}{% endgeneration %}
{% if add_generation_prompt or not loop.last %}{{ "\\n" }}{% endif %}
{% else %}
### {{ "System" if message["role"] == "system" else "User" }}:
{{ message["content"] }}{{ eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
### Assistant:
{% endif %}
"""

# As the model card prints it: no </s> in the prompt. The card always has a system part and names no default for it,
# so none is made up: without a system message the text begins with the user.
_NEURALCHAT_CARD = """\
{% for message in messages %}
{% if message["role"] == "assistant" %}
### Assistant:
{% generation %}
{{ message["content"] }}{{ eos_token }}{% endgeneration %}
{% if add_generation_prompt or not loop.last %}{{ "\\n" }}{% endif %}
{% else %}
### {{ "System" if message["role"] == "system" else "User" }}:
{{ message["content"] }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
### Assistant:
{% endif %}
"""

# HuggingFaceH4's handbook: an empty system message where there is none; BOS, because it tokenised with special tokens.
_ZEPHYR = """\
{{ bos_token }}{% if messages[0]["role"] != "system" %}
<|system|>
{{ eos_token }}
{% endif %}
{% for message in messages %}
<|{{ message["role"] }}|>
{% if message["role"] == "assistant" %}
{% generation %}
{{ message["content"] }}{{ eos_token }}{% endgeneration %}{{ "\\n" }}{% else %}
{{ message["content"] }}{{ eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

# OpenHermes and NeuralHermes: an empty system message is left out.
_CHATML = """\
{{ bos_token }}{% for message in messages %}
{% if message["content"] or message["role"] != "system" %}
<|im_start|>{{ message["role"] }}
{% if message["role"] == "assistant" %}
{% generation %}
{{ message["content"] }}<|im_end|>{% endgeneration %}{{ "\\n" }}{% else %}
{{ message["content"] }}<|im_end|>
{% endif %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

# Mistral-7B-Instruct v0.1 and v0.2: the answer's own first space is the model's to write.
_MISTRAL_INSTRUCT = """\
{{ bos_token }}{% set system = messages[0]["content"] if messages[0]["role"] == "system" else "" %}
{% set turns = messages[1:] if messages[0]["role"] == "system" else messages %}
{% if system and (not turns or turns[0]["role"] != "user") %}
{{ raise_exception("mistral-instruct puts the system message into the first user message: there must be one") }}
{% endif %}
{% for message in turns %}
{% if message["role"] == "user" %}
[INST] {% if system and loop.first %}{{ system }}{{ "\\n\\n" }}{% endif %}{{ message["content"] }} [/INST]
{%- elif message["role"] == "assistant" %}
{% generation %} {{ message["content"] }}{{ eos_token }}{% endgeneration %}
{% else %}
{{ raise_exception("mistral-instruct has one place for a system message: the beginning") }}
{% endif %}
{% endfor %}
"""

_BOS = """\
{% if bos_token and not messages[0]["content"].startswith(bos_token) %}{{ bos_token }}{% endif %}
"""

# The contents as they are.
_NONE = """\
{% for message in messages %}
{% if message["role"] == "assistant" %}
{% generation %}
{{ message["content"] }}{{ eos_token }}{% endgeneration %}
{% else %}{{ message["content"] }}{% endif %}
{% endfor %}
"""

_BUILT_IN = {
    "neuralchat": _NEURALCHAT,
    "neuralchat-card": _NEURALCHAT_CARD,
    "zephyr": _ZEPHYR,
    "chatml": _CHATML,
    "mistral-instruct": _MISTRAL_INSTRUCT,
    "none": _BOS + _NONE,
}
_OURS = frozenset([*_BUILT_IN.values(), _NONE])


def names() -> list[str]:
    """The built-in templates; "auto" is the model's own, or the first of these if it has none."""
    return list(_BUILT_IN)


def template_text(template: str, tokenizer: Tokenizer) -> str:
    """The Jinja text of a template given as a built-in name, "auto", a path to a .jinja file, or Jinja text itself."""
    if template == "auto":
        return tokenizer.chat_template or _NEURALCHAT
    if template == "none":
        return _BUILT_IN["none"] if tokenizer.add_bos else _NONE
    if template in _BUILT_IN:
        return _BUILT_IN[template]
    if "{{" in template or "{%" in template:
        return template
    if template.endswith(".jinja"):
        try:
            return _read(template, os.stat(template).st_mtime_ns)
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--template {template!r} cannot be read ({error}); give a file of Jinja text") from error
    raise BadInput(
        f"template {template!r:.80} is unknown; choose --template from auto, {', '.join(names())}, "
        "a path that ends in .jinja, or Jinja text"
    )


def render(
    messages: list[Message],
    template: str,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    learn: str = "assistant",
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and the mask of what is learnt: 1 on it, 0 elsewhere, the same length.

    learn: "assistant", each answer with its end token, or "all". The ids are those of the whole text, and the ids of
    each prompt are always exactly the beginning of the ids with its answer (see Tokenizer.encode_cut).
    Raises BadInput if the messages or the template are bad, or if the template does not say what the assistant says.
    """
    if learn not in ("assistant", "all"):
        raise BadInput(f"learn is {learn!r}; choose assistant or all")
    jinja = template_text(template, tokenizer)
    text, spans, cuts = sandbox.layout(
        _checked(messages), jinja, tokenizer.special_tokens, add_generation_prompt, jinja in _OURS
    )
    if spans is None and learn == "assistant":
        raise BadInput(
            f"template {short(template)} cannot be masked by construction: a conversation's text does not begin with "
            "the text of its prompt; put {% generation %}…{% endgeneration %} round what the assistant says, "
            "or use --learn all"
        )
    ids, counts = tokenizer.encode_cut(text, cuts)
    if learn == "all":
        return ids, [1] * len(ids)
    mask = [0] * len(ids)
    for start, end in spans or ():
        first, last = bisect_left(cuts, start), bisect_right(cuts, end) - 1  # the cuts inside the span
        if first < last:
            mask[counts[first] : counts[last]] = [1] * (counts[last] - counts[first])
    return ids, mask


def prompt_ids(messages: list[Message], template: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins: what generation starts from."""
    # a template that cannot be masked can still be talked to
    return render(messages, template, tokenizer, add_generation_prompt=True, learn="all")[0]


def text(messages: list[Message], template: str, tokenizer: Tokenizer, add_generation_prompt: bool) -> str:
    """A conversation as a template writes it, before it is tokenised."""
    jinja = template_text(template, tokenizer)
    return sandbox.text(_checked(messages), jinja, tokenizer.special_tokens, add_generation_prompt, jinja in _OURS)


def stops(template: str, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids and the strings that end an answer: the tokenizer's ids, and what the template writes after an answer.

    ChatML's <|im_end|> is a token of the models that were made for it, and to every other tokenizer plain text.
    """
    jinja, end = template_text(template, tokenizer), ""
    said = "\N{SNOWMAN}"  # nothing that a template writes itself
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    for messages in (turn, [{"role": "system", "content": "a"}, *turn]):  # some want a system message, some none
        try:
            text, spans, _ = sandbox.layout(messages, jinja, tokenizer.special_tokens, False, jinja in _OURS)
        except BadInput:
            continue
        end = text[slice(*spans[-1])].rpartition(said)[2].strip() if spans else ""
        break
    id = tokenizer.special_id(end)
    ids = tokenizer.stop_ids if id is None else dict.fromkeys([*tokenizer.stop_ids, id])
    return tuple(ids), (end,) if end and id is None else ()


def _checked(messages: list[Message]) -> list[Message]:
    if not isinstance(messages, list | tuple) or not messages:
        raise BadInput(f"messages is {messages!r:.80}; it must be a list of at least one message")
    plain = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise BadInput(f"message {i} is {message!r:.80}; its role must be system, user or assistant")
        content = message.get("content")
        if not isinstance(content, str):
            raise BadInput(f"message {i} has content {content!r:.80}; it must be a string")
        plain.append({"role": role, "content": content})
    return plain


@functools.lru_cache
def _read(path: str, mtime_ns: int) -> str:
    return Path(path).read_text(encoding="utf-8-sig")
