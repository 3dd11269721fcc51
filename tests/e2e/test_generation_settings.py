"""What a model's generation_config.json asks for is honoured by `quicksilver generate`, or refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import ModelFolder, Outcome

PROMPT = "The river"

WithSettings = Callable[..., Path]


@pytest.fixture
def with_settings(model_copy: Callable[..., ModelFolder]) -> WithSettings:
    """Return a function from generation settings to the folder of a tiny model that has them."""

    folder = model_copy("llama").path

    def make(**settings: Any) -> Path:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0} | settings))
        return folder

    return make


def new_tokens(outcome: Outcome) -> int:
    """Return how many new tokens the statistics say there were."""
    seconds, rate = re.search(r"time +([\d.]+) s, ([\d.]+) new tokens/s", outcome.err).groups()  # type: ignore[union-attr]
    return round(float(seconds) * float(rate))


def test_stop_strings_end_the_text(cli: Callable[..., Outcome], with_settings: WithSettings) -> None:
    folder = with_settings()
    free = cli("generate", folder, PROMPT, "--max-new-tokens", 20).out
    stop = next(symbol for symbol in free[3:] if symbol.isprintable() and symbol.isascii())
    folder = with_settings(stop_strings=[stop])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=20, do_sample=False, tokenizer=tokenizer)[0, len(PROMPT) :]
    assert len(expected) < 20
    outcome = cli("generate", folder, PROMPT, "--max-new-tokens", 20)
    assert outcome.status == 0
    assert outcome.out.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\n")


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"return_dict_in_generate": True}], ids=str)
def test_new_tokens_are_those_of_the_continuation(
    cli: Callable[..., Outcome],
    with_settings: WithSettings,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter((0.0, 100.0))  # so that rates, rounded as they are printed, tell numbers apart
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks, 100.0))
    outcome = cli("generate", with_settings(**settings), PROMPT, "--max-new-tokens", 10, "--stats")
    assert outcome.status == 0
    assert new_tokens(outcome) == 10


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"num_return_sequences": 2}, "generation_config.json: these settings cannot be used"),
        ({"num_return_sequences": "2"}, "generation_config.json"),
        ({"stop_strings": [3]}, "generation_config.json"),
        ({"num_beams": 4}, "beam search"),
        ({"bad_words_ids": []}, "bad_words_ids"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_is_not_honoured_is_refused_in_one_line(
    cli: Callable[..., Outcome], with_settings: WithSettings, settings: dict[str, Any], named: str
) -> None:
    outcome = cli("generate", with_settings(**settings), PROMPT, "--max-new-tokens", 5)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.said[0].startswith("quicksilver: error: ")
    assert len(outcome.said) == 1
    assert named in outcome.err
