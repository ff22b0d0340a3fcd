"""What a chat template writes by itself: the texts whose tokens it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = "a"
CHATS = (("user",), ("user", "assistant"), ("system", "user"), ("system", "user", "assistant", "user", "assistant"))
# What is kept must not depend on the day on which a template that writes today's date is rendered.
DATED = "{%- macro strftime_now(format) -%}1 Jan 2024{%- endmacro -%}"


def template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Short conversations as the chat templates write them, and every literal string in the templates."""
    templates = tokenizer.chat_template or {}
    named = templates if isinstance(templates, dict) else {"default": templates}
    return [text for template in named.values() for text in (*_rendered(tokenizer, template), *_literals(template))]


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str) -> Iterator[str]:
    for roles, is_prompt in product(CHATS, (False, True)):
        chat = [{"role": role, "content": CONTENT} for role in roles]
        with contextlib.suppress(TemplateError, TypeError):  # it takes no such roles, or no plain text
            yield str(
                tokenizer.apply_chat_template(
                    chat, chat_template=DATED + template, tokenize=False, add_generation_prompt=is_prompt
                )
            )


def _literals(template: str) -> Iterator[str]:
    lexer = Environment(trim_blocks=True, lstrip_blocks=True).lexer  # as transformers reads templates
    return (token.value for token in lexer.tokenize(template) if token.type in ("data", "string"))
