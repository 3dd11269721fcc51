"""`quicksilver eval` and `demo`: the JSON schema, the table, and figures that agree with transformers."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny, tolerances
from tests.e2e.conftest import (
    CUT,
    FORCED,
    RANDOM,
    SENTENCES,
    ModelFolder,
    Outcome,
    assert_refusal,
    no_constants,
    run_process,
)

ENGINE_SCHEMA: dict[str, Any] = {
    "nll": float,
    "ppl": float,
    "bits_per_byte": float,
    "flops_per_token": float,
    "bitops_per_token": float,
    "weight_bytes_per_token": float,
    "kv_bytes": float,
    "seconds": float,
    "tokens_per_second": float,
}
SCHEMA: dict[str, Any] = {
    "model": {"name": str, "family": str, "layers": int, "dtype": str},
    "plan": {"name": str, "hash": str, "version": int},
    "protocol": {"context": int, "stride": int, "bos": bool, "mode": str, "text": str},
    "environment": {"torch": str, "transformers": str, "cpu": str, "threads": int, "device": str},
    "tokens_scored": int,
    "dense": ENGINE_SCHEMA,
    "accelerated": {
        **ENGINE_SCHEMA,
        "mean_depth": float,
        "halted_by_layer": list,
        "fused_fraction": float,
        "width_histogram": {"8": float, "4": float, "2": float, "0": float},
    },
    "delta": {
        "ppl": float,
        "ppl_ci95": list,
        "nll": float,
        "kl": float,
        "top1_agreement": float,
        "flops_reduction": float,
        "flops_body_reduction": float,
        "bitops_reduction": float,
        "weight_bytes_reduction": float,
        "kv_bytes_reduction": float,
        "speedup": float,
    },
}
"""`eval --json` as ../shared/docs/evaluation.md promises it; additions are allowed."""


def check_schema(value: Any, schema: Any, where: str = "$") -> None:
    """Check that a decoded JSON value has every key of a schema, with its type."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, inner in schema.items():
            assert key in value, f"{where}.{key} is missing"
            check_schema(value[key], inner, f"{where}.{key}")
        return
    expected = (int, float) if schema is float else schema
    assert isinstance(value, expected), f"{where} is {value!r}"
    assert schema is bool or not isinstance(value, bool), where
    assert not isinstance(value, float) or math.isfinite(value), where


@pytest.mark.parametrize("mode", ["score", "decode"])
def test_eval_json_follows_the_schema(
    evaluate: Callable[..., Any],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    plan_file: Callable[..., Path],
    mode: str,
) -> None:
    folder, mine = tiny_model_dir("gpt2"), plan_file(halting=FORCED)
    arguments = (folder, "--text", text_file, "--plan", "dense", "--plan", mine, "--mode", mode, *CUT)
    dense, forced = results = evaluate(*arguments)
    for result in results:
        check_schema(result, SCHEMA)
        assert result["protocol"] | {"context": 32, "stride": 16, "mode": mode, "bos": False} == result["protocol"]
        assert result["protocol"]["text"] == "book.txt"
        assert result["model"]["family"] == "gpt2"
        assert result["tokens_scored"] == len(SENTENCES * 3) - 1
        for side in (result["dense"], result["accelerated"]):
            assert side["ppl"] == pytest.approx(math.exp(side["nll"]))
            scored_bits = side["nll"] * result["tokens_scored"] / math.log(2)
            assert side["bits_per_byte"] == pytest.approx(scored_bits / (len(SENTENCES * 3) - 1))
    delta = dense["delta"]
    for key in ("ppl", "nll", "kl", *(k for k in delta if k.endswith("_reduction"))):
        assert delta[key] == 0.0, key
    assert delta["ppl_ci95"] == [0.0, 0.0]
    assert delta["top1_agreement"] == 1.0
    assert dense["accelerated"]["mean_depth"] == 4.0
    assert dense["accelerated"]["halted_by_layer"] == [0, 0, 0, 0]
    assert dense["accelerated"]["nll"] == dense["dense"]["nll"]
    assert [result["plan"]["name"] for result in results] == ["dense", "mine"]
    assert forced["dense"] == dense["dense"]
    assert forced["accelerated"]["mean_depth"] < 4.0
    assert sum(forced["accelerated"]["halted_by_layer"]) > 0
    delta = forced["delta"]
    assert 0.0 < delta["flops_reduction"] < delta["flops_body_reduction"] < 1.0
    assert delta["kl"] > 0.0
    assert delta["ppl_ci95"][0] <= delta["ppl"] <= delta["ppl_ci95"][1]
    assert delta["ppl"] == pytest.approx(forced["accelerated"]["ppl"] - forced["dense"]["ppl"])
    assert delta["nll"] == pytest.approx(forced["accelerated"]["nll"] - forced["dense"]["nll"])


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_dense_perplexity_is_transformers(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], text_file: Path, family: str
) -> None:
    folder = tiny_model_dir(family)
    (result,) = evaluate(folder, "--text", text_file, "--context", 32, "--stride", 20, "--max-tokens", 101)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text_file.read_text(), return_tensors="pt").input_ids[0, :101]
    losses, done = [], 1
    for start in range(0, 101, 20):
        window = ids[start : start + 32]
        with torch.no_grad():
            log_probs = model(window[None]).logits[0].log_softmax(-1)
        fresh = range(done - start, len(window))
        losses += [-log_probs[i - 1, window[i]].item() for i in fresh]
        done = max(done, start + len(window))
    assert result["tokens_scored"] == len(losses) == 100
    assert result["dense"]["nll"] == pytest.approx(sum(losses) / len(losses), abs=tolerances.LOSS)


@pytest.mark.parametrize("kind", ["text", "documents"])
def test_score_and_decode_agree(
    evaluate: Callable[..., Any],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    plan_file: Callable[..., Path],
    kind: str,
) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": SENTENCES[:n]}) + "\n" for n in (40, 3, 12)))
    source = ("--text", text_file) if kind == "text" else ("--documents", documents)
    plans = [
        plan_file(f"{fill}.json", halting=halting, kv={"fill": fill})
        for fill, halting in (("drop", RANDOM), ("zero", FORCED), ("propagate", RANDOM))
    ]
    cut = ("--context", 16, "--stride", 8, "--max-tokens", 60)
    arguments = [tiny_model_dir("llama"), *source, *cut, *(a for plan in plans for a in ("--plan", plan))]
    scored, decoded = (evaluate(*arguments, "--mode", mode) for mode in ("score", "decode"))
    for by_score, by_decode in zip(scored, decoded, strict=True):
        for side in ("dense", "accelerated"):
            assert by_decode[side]["nll"] == pytest.approx(by_score[side]["nll"], abs=tolerances.DECODED_LOSS)
        assert by_decode["delta"]["kl"] == pytest.approx(by_score["delta"]["kl"], abs=tolerances.DECODED_LOSS)
        assert by_score["delta"]["nll"] != 0.0


def test_documents_are_scored_on_their_own(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = (SENTENCES, "Short.", "x", SENTENCES[:33])
    documents = tmp_path / "documents.jsonl"
    documents.write_text("\n\n".join(json.dumps({"text": text, "url": "somewhere"}) for text in texts))
    arguments = (tiny_model_dir("mistral"), "--documents", documents, *CUT)
    (together,) = evaluate(*arguments)
    assert together["tokens_scored"] == sum(len(text) - 1 for text in texts)
    total = 0.0
    for text in texts:
        documents.write_text(json.dumps({"text": text + "\n"}) + "\n")
        if len(text) > 1:
            documents.write_text(json.dumps({"text": text}))
            (alone,) = evaluate(*arguments)
            total += alone["dense"]["nll"] * alone["tokens_scored"]
    mean = total / together["tokens_scored"]
    assert together["dense"]["nll"] == pytest.approx(mean, abs=tolerances.LOSS)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_only_newlines_end_a_json_line(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], tmp_path: Path, separator: str
) -> None:
    documents = tmp_path / "documents.jsonl"
    text = f"One line.{separator}And another."
    documents.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (result,) = evaluate(tiny_model_dir("gpt2"), "--documents", documents, *CUT)
    assert result["tokens_scored"] == len(text.encode()) - 1


def test_windows_of_two_tokens_can_be_decoded(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "ab"}\n{"text": "cd"}\n')
    arguments = (tiny_model_dir("gpt2"), "--documents", documents, *CUT)
    (scored,), (decoded,) = (evaluate(*arguments, "--mode", mode) for mode in ("score", "decode"))
    assert decoded["dense"]["nll"] == pytest.approx(scored["dense"]["nll"], abs=tolerances.DECODED_LOSS)


def test_bos_is_prepended_where_the_tokenizer_does_so(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], tmp_path: Path, text_file: Path
) -> None:
    folder = tmp_path / "with-bos"
    shutil.copytree(tiny_model_dir("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    tokenizer.save_pretrained(folder)
    arguments = (folder, "--text", text_file, "--context", 33, "--stride", 16)
    (scored,), (decoded,) = (evaluate(*arguments, "--mode", mode) for mode in ("score", "decode"))
    assert scored["protocol"]["bos"] is True
    assert scored["tokens_scored"] == len(SENTENCES * 3)
    assert decoded["dense"]["nll"] == pytest.approx(scored["dense"]["nll"], abs=tolerances.DECODED_LOSS)


def test_defaults_of_the_protocol(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], text_file: Path
) -> None:
    (result,) = evaluate(tiny_model_dir("qwen2"), "--text", text_file)
    assert result["plan"]["name"] == "dense"
    assert (result["protocol"]["context"], result["protocol"]["stride"]) == (64, 32)
    assert result["protocol"]["mode"] == "score"


def test_texts_are_read_before_anything_is_quantized(
    cli: Callable[..., Outcome],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unexpected(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("quicksilver.families.quantize.quantize", unexpected)
    short = tmp_path / "short.txt"
    short.write_text("x")
    plan = ("--plan", "channel-5bit")
    for text, more in ((short, ()), (text_file, ("--context", 65)), (text_file, ("--calibration", short))):
        assert_refusal(cli("eval", tiny_model_dir("llama"), "--text", text, *plan, *more))


def test_the_progress_bar_is_for_terminals(
    cli: Callable[..., Outcome],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import quicksilver.cli.common as common

    class Terminal:
        def isatty(self) -> bool:
            return True

        def __getattr__(self, name: str) -> Any:
            return getattr(sys.__stderr__, name)

    shown = []
    monkeypatch.setattr("rich.progress.Progress.add_task", lambda self, label, total: shown.append((label, total)) or 0)
    cli("eval", tiny_model_dir("gpt2"), "--text", text_file, *CUT)
    assert shown == []
    monkeypatch.setattr(common.sys, "stderr", Terminal())
    with common.progress("windows", 7):
        pass
    assert shown == [("windows", 7)]


@pytest.mark.parametrize("windows", [2, 14])
def test_without_a_terminal_there_is_a_line_of_progress_now_and_then(
    cli: Callable[..., Outcome],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    windows: int,
) -> None:
    """Here after every window that is run, the warm-up and what is timed again included."""
    monkeypatch.setattr("quicksilver.cli.common._REPORT_SECONDS", 0.0)
    cut = ("--context", 32, "--stride", 16, "--max-tokens", 16 * (windows + 1))
    outcome = cli("eval", tiny_model_dir("gpt2"), "--text", text_file, *cut)
    runs = {2: 1 + 3 * 2, 14: 1 + 14}[windows]
    lines = [line for line in outcome.err.splitlines() if line.startswith("windows: ")]
    assert [line.split(",")[0] for line in lines] == [f"windows: {done} of {runs}" for done in range(1, runs + 1)]
    assert lines[-1].endswith(", about 0 s left")


def test_a_hopeless_model_is_measured_all_the_same(
    cli: Callable[..., Outcome], model_copy: Callable[..., ModelFolder], text_file: Path
) -> None:
    folder = model_copy("llama").edit_weights(lambda tensors: tensors["lm_head.weight"].mul_(1e4))
    assert cli("eval", folder, "--text", text_file, "--plan", "settled", *CUT).status == 0


def test_dtype_and_threads(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], text_file: Path
) -> None:
    options = ("--dtype", "bfloat16", "--threads", 1, "--device", "cpu", *CUT)
    (result,) = evaluate(tiny_model_dir("llama"), "--text", text_file, *options)
    assert result["model"]["dtype"] == "bfloat16"
    assert result["environment"]["threads"] == 1
    assert result["accelerated"]["width_histogram"]["16"] == 1.0


def test_an_older_result_is_replaced(
    evaluate: Callable[..., Any], tiny_model_dir: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.json").write_text("old")
    before = set(tmp_path.iterdir())
    check_schema(evaluate(tiny_model_dir("gpt2"), "--text", text_file, *CUT)[0], SCHEMA)
    assert set(tmp_path.iterdir()) == before


def test_a_model_in_the_working_folder_has_a_name(
    evaluate: Callable[..., Any],
    tiny_model_dir: Callable[[str], Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_model_dir("gpt2"))
    (result,) = evaluate(".", "--text", text_file, *CUT)
    assert result["model"]["name"] == tiny_model_dir("gpt2").name


def test_demo_measures_draws_and_generates(
    cli: Callable[..., Outcome], model_copy: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = model_copy("llama").edit_config(max_position_embeddings=128)
    output = tmp_path / "new" / "results"
    outcome = cli("demo", "--output", output, "--max-tokens", 200, "--model", folder)
    assert (outcome.status, outcome.said) == (0, [])
    picture, figures = output / f"{folder.name}.png", output / f"{folder.name}.json"
    assert set(output.iterdir()) == {picture, figures}
    results = json.loads(figures.read_text(), parse_constant=no_constants)
    assert len(results) > 1
    for result in results:
        check_schema(result, SCHEMA)
        assert result["model"]["name"] == folder.name
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert str(picture) in outcome.out
    assert outcome.out.count("Time is not saved in windows yet") == 1
    assert "The river rises in the mountains and" in outcome.out


def test_demo_of_a_model_with_a_short_context(
    cli: Callable[..., Outcome], tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ("--output", tmp_path / "demo", "--max-tokens", 100, "--model", tiny_model_dir("gpt2"))
    outcome = cli("demo", *arguments)
    assert (outcome.status, outcome.said) == (0, [])


def test_eval_as_a_process(tiny_model_dir: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    result = tmp_path / "out.json"
    arguments = ("--text", text_file, "--plan", "settled", "--mode", "decode", *CUT, "--json", result)
    outcome = run_process("eval", tiny_model_dir("llama"), *arguments)
    assert (outcome.status, outcome.said) == (0, [])
    assert "\nsettled " in outcome.out
    check_schema(json.loads(result.read_text(), parse_constant=no_constants)[0], SCHEMA)


def test_the_real_model_in_shared_is_measured(evaluate: Callable[..., Any], shared_dir: Path) -> None:
    folder, text = shared_dir / "data" / "models" / "stories260K", shared_dir / "data" / "text" / "wiki.holdout.txt"
    (result,) = evaluate(folder, "--text", text, "--plan", "settled", "--context", 128, "--max-tokens", 512)
    check_schema(result, SCHEMA)
    assert result["model"]["vocab_size"] > tiny.VOCAB
    assert 1.0 < result["dense"]["nll"] < 12.0
