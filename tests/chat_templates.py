"""Chat templates with traits of real ones, and chats that show them."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]

_EACH, _DONE = "{% for m in messages %}", "{% endfor %}"
_HEADER = "<|{{ m.role }}|>\n"
_ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
_ANSWER = "{% if m.role == 'assistant' %}"


def turns(content: str = "{{ m.content }}<|end|>\n", ask: str = _ASK) -> str:
    """A template with a header and `content` per message; `ask` is its generation prompt."""
    return f"{_EACH}{_HEADER}{content}{_DONE}{ask}"


PLAIN = turns()
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|system|>\nYou are kind.<|end|>\n{% endif %}" + PLAIN
)
TRIMS = turns("{{ m.content | trim }}<|end|>\n")
CALLS = turns(
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</call>{% endfor %}<|end|>\n"
)
TEXT_CALLS = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
BARE_CALLS = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
ITEM_CALLS = turns(
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}</call>{% endfor %}"
    "<|end|>\n"
)
NONE_CALLS = CALLS.replace(
    "{{ m.content }}", "{{ m.content if not m.tool_calls else '' }}"
).replace(
    "{% for c in m.tool_calls or [] %}",
    "{% for c in (m.tool_calls or []) if m.content is none %}",
)
THINKS = turns(
    "{% set c = m.content %}{% set t = m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ t.strip() }}\n</think>\n\n{% endif %}"
    "{{ c.strip() }}<|end|>\n"
)
ASKS_THOUGHTS = THINKS.removesuffix(_ASK) + _ASK.replace("|>\n", "|>\n<think>\n")
ASKS_NO_THOUGHTS = turns(ask=_ASK.replace("|>\n", "|>\n<think>\n\n</think>\n\n"))
MARKED = turns(
    _ANSWER + "{% generation %}{{ m.content }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}"
)
MARKED_HEADER = (
    _EACH + _ANSWER + "{% generation %}" + _HEADER + "{{ m.content }}{% endgeneration %}<|end|>\n"
    "{% else %}" + _HEADER + "{{ m.content }}<|end|>\n{% endif %}" + _DONE + _ASK
)
MARKED_LAST = turns(
    "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n"
)
NO_END = turns("{{ m.content }}")
END_BETWEEN = turns("{{ m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}")
END_LAST = turns("{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}")
END_TWICE = PLAIN.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"
OTHER_END_LAST = turns(
    "{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' and not add_generation_prompt %}<|return|>"
    "{% else %}<|end|>{% endif %}"
)
OTHER_END_ALWAYS = (
    _EACH + "<|start|>{{ m.role }}\n{{ m.content }}<|{{ 'return' if loop.last else 'end' }}|>" +
    _DONE + "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)  # fmt: skip
NEVER_ASKS = turns(ask="")
SPEAKERS = (
    "A chat.\n" + _EACH + "{{ m.role | upper }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}" + _DONE +
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)  # fmt: skip
SYSTEM_IN_LAST = (
    "{% set ns = namespace(s='') %}" + _EACH + "{% if m.role == 'system' %}{% set ns.s = m.content "
    "%}{% elif m.role == 'user' %}[INST] {{ ns.s if loop.last else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}" + _DONE
)
MERGES = (
    _EACH + "{% if loop.previtem and loop.previtem.role == m.role %} {% else %}" + _HEADER +
    "{% endif %}{{ m.content }}{% if not (loop.nextitem and loop.nextitem.role == m.role) %}<|end|>"
    "\n{% endif %}" + _DONE + _ASK
)  # fmt: skip
CHANNELS = (
    _EACH + _ANSWER + "{% if 'thinking' in m and loop.last %}<|start|>assistant<|channel|>thoughts"
    "<|message|>{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif"
    " %}" + _DONE + "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
PARTS = turns(
    "{% for p in m.content %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<|end|>\n"
)
NAMES_TOOL_AGAIN = (
    "{% set ns = namespace(tool='') %}" + _EACH + "{% if m.role == 'tool' %}<|from {{ ns.tool }}|>"
    "{{ m.content }}<|end|>{% else %}<|{{ m.role }}|>{% for c in m.tool_calls or [] %}"
    "{% set ns.tool = c.function.name %}to {{ ns.tool }} {{ c.function.arguments | tojson }}"
    "{% endfor %}{{ m.content }}<|end|>{% endif %}" + _DONE +
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)  # fmt: skip
DATED = "{{ strftime_now('%d %b %Y') }}\n" + PLAIN
TOOLS = "{% for t in tools or [] %}<tool>{{ t | tojson }}{% endfor %}" + CALLS
DOCUMENTS = "{% for d in documents or [] %}<doc>{{ d.text }}{% endfor %}" + PLAIN


def say(role: str, content: str, **more: Any) -> Message:
    """A message."""
    return {"role": role, "content": content, **more}


def dialogue(*contents: str) -> tuple[Message, ...]:
    """Messages of the user and the assistant in turns."""
    return tuple(say(("user", "assistant")[i % 2], text) for i, text in enumerate(contents))


def call(name: str, **arguments: Any) -> Message:
    """A tool call."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ONE = dialogue("Hi", "Hello.")
TWO = dialogue("Hi", "Hello.", "More", "Sure.")
WITH_SYSTEM = (say("system", "Be brief."), *TWO)
FIRST = (say("assistant", "Hello!"), *dialogue("Hi", "Hi."))
TOOL = (
    say("user", "How is it?"), say("assistant", "", tool_calls=[call("sky", city="Oslo")]),
    say("tool", "cold"), say("assistant", "Cold."),
)  # fmt: skip
THOUGHTS = dialogue("Hi", "<think>greet</think>Hello.", "More", "<think>go on</think>Sure.")
REASONED = tuple(
    message | {"reasoning_content": "because"} if message["role"] == "assistant" else message
    for message in TWO
)
