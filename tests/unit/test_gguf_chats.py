"""Chats are rendered from a GGUF file's template as transformers renders them, and begin as texts do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import gguf_files
from tests.gguf_files import CONTROL, NORMAL, bpe, spm, tokenizer_of

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "the usual": (CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
    "lines of blocks": ("{% if true %}\n    {% if true %}\nx\n    {% endif %}\n{% endif %}\n", "x\n"),
    "dates": ("{{ strftime_now('%Y')[:2] }}", "20"),
    "loop controls": ("{% for i in range(9) %}{{ i }}{% if i == 2 %}{% break %}{% endif %}{% endfor %}", "012"),
    "generation tags": ("{% generation %}x{% endgeneration %}", "x"),
    "JSON": ("{{ {'a': '<\u00e9>'} | tojson }}", '{"a": "<\u00e9>"}'),
    "tokens": ("{{ eos_token }}{{ pad_token is defined }}{{ tools is none }}", "<|im_end|>FalseTrue"),
    "signs": ("\u2581x", "\u2581x"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_as_transformers_does(tmp_path: Path, name: str) -> None:
    template, expected = TEMPLATES[name]
    eos = len(gguf_files.trained_bpe()[0])
    vocabulary = bpe("qwen2", {"<|im_end|>": CONTROL, "<|im_start|>": CONTROL}, eos_token_id=eos)
    tokenizer = tokenizer_of(tmp_path, {**vocabulary, "tokenizer.chat_template": template})
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected


def test_a_template_may_refuse_a_chat_or_be_broken_without_harm_to_texts(tmp_path: Path) -> None:
    for template in ("{{ raise_exception('no system') }}", "{% if %}"):
        tokenizer = tokenizer_of(tmp_path, {**bpe("qwen2"), "tokenizer.chat_template": template})
        assert tokenizer("hi").input_ids
        with pytest.raises(Exception, match=r"no system|Expected an expression"):
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_named_templates_are_kept_and_the_default_wins(tmp_path: Path) -> None:
    named = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.rag": "rag"}
    tokenizer = tokenizer_of(tmp_path, {**bpe("qwen2"), **named})
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "plain"
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template="rag") == "rag"
    tokenizer = tokenizer_of(tmp_path, {**bpe("qwen2"), **named, "tokenizer.chat_template.default": "mine"})
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "mine"


def test_without_a_template_chats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat_template"):
        tokenizer_of(tmp_path, bpe("qwen2")).apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("template", ["{{ bos_token }}hh", "hh", "<s>hh"])
@pytest.mark.parametrize("adds", [False, True])
def test_a_chat_begins_with_one_bos_where_texts_do(tmp_path: Path, template: str, adds: bool) -> None:
    vocabulary = spm({"h": (0.0, NORMAL)}, add_bos_token=adds)
    tokenizer = tokenizer_of(tmp_path, {**vocabulary, "tokenizer.chat_template": template})
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=True)["input_ids"]
    assert ids.count(1) == (1 if adds or template != "hh" else 0)
    assert (ids[0] == 1) == (ids.count(1) == 1)
