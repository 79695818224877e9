"""A chat and a template for it."""

from __future__ import annotations

END = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the teacher speaks"},
    {"role": "assistant", "content": "once and for all ✓"},
    {"role": "user", "content": "and the student"},
    {"role": "assistant", "content": "listens"},
)
