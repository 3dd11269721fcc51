"""lm-evaluation-harness: our models under its own model class and as the model `quicksilver`, on tasks written here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra lm-eval)")

import lm_eval.tasks
from lm_eval import evaluate, simple_evaluate
from lm_eval.models.huggingface import HFLM

import quicksilver
from quicksilver.errors import InputError, ModelError, PlanError, QuickSilverError
from quicksilver.integrations.lm_eval import QuickSilverLM, main
from quicksilver.loading.quantized import save_quantized
from quicksilver.plan import Plan
from quicksilver.rules import HaltingConfig, KVConfig, PropagateFill, RelativeDriftRule
from tests import tiny
from tests.e2e.conftest import FORCED, RANDOM, own_lines
from tests.tolerances import LOGLIKELIHOOD

SENTENCES = ("The river", "Nobody has counted its bends", "It is", "Water runs to the sea", "Hills!")
FUSING = {"rule": {"type": "random", "probability": 0.5}, "layers": [2], "scope": "all", "protect_first": 1}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
    },
    "words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{start}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "until": {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["S", "\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one small task of each kind, over five documents; rolling texts are longer than the context."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = ["a hill", "the sea", "rivers!"]
    documents = [
        {"start": start, "choices": choices[: 2 + i % 2], "answer": i % 2, "text": f"{start}. " * (1 + 3 * i)}
        for i, start in enumerate(SENTENCES)
    ]
    data = folder / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    for name, body in TASKS.items():
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **body}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def answers(tasks: Path) -> Callable[..., dict[str, list[Any]]]:
    """Return a function from a model of the harness, or the text of --model_args, to its answers to each task."""
    loaded = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False).load(list(TASKS))

    def run(model: Any, *names: str) -> dict[str, list[Any]]:
        chosen = {**loaded, "tasks": {name: loaded["tasks"][name] for name in names or TASKS}}
        made = QuickSilverLM.create_from_arg_string(model) if isinstance(model, str) else model
        samples = evaluate(made, chosen, bootstrap_iters=0, log_samples=True)["samples"]
        ordered = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in samples.items()}
        return {name: [answer for row in rows for answer in row["filtered_resps"]] for name, rows in ordered.items()}

    return run


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized model and its tokenizer."""
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    save_quantized(tiny.quantized("llama"), folder, tiny.tokenizer())
    return folder


def assert_same(answers: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    """Compare loglikelihoods within their tolerance, and all else exactly."""
    assert answers.keys() == expected.keys()
    for name, rows in expected.items():
        numbers = [list(_numbers(row)) for row in rows]
        assert [list(_numbers(row)) for row in answers[name]] == [
            pytest.approx(row, abs=LOGLIKELIHOOD, rel=0) if name != "until" else row for row in numbers
        ]


def _numbers(row: Any) -> Iterator[Any]:
    yield from row if isinstance(row, (tuple, list)) else (row,)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_dense_plan_answers_as_transformers(
    answers: Callable[..., Any], tiny_model_dir: Callable[[str], Path], family: str, batch_size: int
) -> None:
    folder = str(tiny_model_dir(family))
    expected = answers(HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=batch_size))
    given = f"pretrained={folder},plan=dense,dtype=float32,device=cpu,kernels=auto,batch_size={batch_size}"
    assert_same(answers(given), expected)


PLANS: dict[str, dict[str, Any]] = {
    "drifting": Plan(
        "drifting", HaltingConfig(RelativeDriftRule(1.0), min_layer=1), KVConfig(PropagateFill())
    ).to_dict(),
    "forced": {"version": 2, "halting": FORCED},
    "random": {"version": 2, "halting": RANDOM, "kv": {"fill": "propagate"}},
    "fusing": {"version": 2, "fusion": FUSING},
}


@pytest.mark.parametrize(
    ("plan", "batch_size"), [*((plan, "8") for plan in PLANS), ("random", "auto,max_batch_size=2")]
)
def test_batches_and_their_padding_change_no_answer(
    answers: Callable[..., Any], folder: Path, plan: str, batch_size: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(PLANS[plan]), encoding="utf-8")
    given = f"pretrained={folder},plan={tmp_path / 'mine.json'},batch_size="
    alone = answers(f"{given}1")
    assert alone["words"] != answers(QuickSilverLM(folder), "words")["words"]
    assert_same(answers(f"{given}{batch_size}"), alone)


@pytest.mark.parametrize("given", ["folder", "loaded", "harness"])
def test_quantized_models_answer_alike_however_they_are_given(
    answers: Callable[..., Any], quantized_dir: Path, given: str
) -> None:
    expected = answers(QuickSilverLM(quantized_dir, kernels="torch"), "choice", "until")
    loaded = quicksilver.load(quantized_dir, kernels="torch")
    made = {
        "folder": lambda: QuickSilverLM(str(quantized_dir), kernels="torch", batch_size=8),
        "loaded": lambda: QuickSilverLM(loaded, device="cpu", batch_size=2),
        "harness": lambda: HFLM(pretrained=loaded, batch_size=8),
    }[given]()
    assert_same(answers(made, "choice", "until"), expected)


@pytest.mark.parametrize("family", tiny.LAYOUTS)
def test_the_harness_own_class_takes_our_models(
    answers: Callable[..., Any], tiny_model_dir: Callable[[str], Path], family: str
) -> None:
    folder = tiny_model_dir(family)
    expected = answers(HFLM(pretrained=str(folder), device="cpu", dtype="float32"))
    assert_same(answers(HFLM(pretrained=quicksilver.load(folder), batch_size=4)), expected)
    accelerated = quicksilver.accelerate(tiny.model(family))
    assert_same(answers(HFLM(pretrained=accelerated, tokenizer=tiny.tokenizer())), expected)


@pytest.mark.parametrize("add", [True, False, None])
def test_bos_is_added_as_by_the_harness(answers: Callable[..., Any], folder: Path, add: bool | None) -> None:
    expected = answers(HFLM(pretrained=str(folder), device="cpu", dtype="float32", add_bos_token=add), "words", "until")
    assert_same(answers(f"pretrained={folder},add_bos_token={add}", "words", "until"), expected)


def test_results_say_what_was_saved(
    tasks: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(PLANS["forced"]), encoding="utf-8")
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    given = f"pretrained={folder},plan={tmp_path / 'mine.json'},batch_size=auto,max_batch_size=16"
    config = simple_evaluate("quicksilver", given, tasks=["words"], task_manager=manager, bootstrap_iters=0)["config"]
    info = config["quicksilver"]
    assert (info["plan"], info["batch_size"]) == ("mine", "auto")
    assert 1.0 < info["mean_depth"] < 4.0
    assert 0.0 < info["flops_reduction"] == 1 - info["flops"] / info["dense_flops"]
    asked = [len(f"{start} a hill") for start in SENTENCES]  # a token each, and the last is not fed
    assert info["tokens"] == len(asked) * (max(asked) - 1)  # one padded batch, and not the trials of batch sizes
    line = f"quicksilver: plan mine: {info['tokens']} tokens, mean depth {info['mean_depth']:.2f} of 4 layers"
    assert line in capsys.readouterr().err
    assert config["model_num_parameters"] == tiny.model("llama").num_parameters()


REFUSED: dict[str, tuple[type[QuickSilverError], str]] = {
    "pretrained": (InputError, "give an embedded model's name"),
    "pretrained=/nowhere": (ModelError, "/nowhere: no such model folder"),
    "plan=nosuch": (PlanError, "nosuch: neither a preset"),
    "plan=mild": (PlanError, "preset mild is calibrated to a model"),
    "dtype=int3": (ModelError, "dtype 'int3'"),
    "device=tpu": (ModelError, "device 'tpu' is not supported"),
    "device=cuda:77": (ModelError, "'cuda:77' was asked for"),
    "kernels=native": (InputError, "no any-precision weights"),
    "kernels=best": (QuickSilverError, "best"),
    "tokenizer=/nowhere": (ModelError, "/nowhere"),
    "batch_size=0": (InputError, "batch_size=0"),
    "batch_size=many": (InputError, "batch_size=many"),
    "batch_size=auto:0": (InputError, "batch_size=auto:0"),
    "max_batch_size=0": (InputError, "max_batch_size=0"),
    "max_length=65": (InputError, "max_length=65 is longer than the model's context of 64"),
    "max_length=long": (InputError, "max_length=long"),
    "add_bos_token=perhaps": (InputError, "add_bos_token=perhaps"),
    "softmax_dtype=int8": (InputError, "softmax_dtype=int8"),
    "peft=adapter": (InputError, "peft=adapter is not supported"),
    "delta=other": (InputError, "delta=other is not supported"),
    "parallelize=True": (InputError, "parallelize=True is not supported"),
    "trust_remote_code=True": (InputError, "trust_remote_code=True is not supported"),
    "revision=old": (InputError, "revision=old is not supported"),
    "gguf_file=x.gguf": (InputError, "gguf_file=x.gguf is not supported"),
    "load_in_8bit=True": (InputError, "load_in_8bit=True is unknown"),
    "pan=settled": (InputError, "pan=settled is unknown"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_be_done_is_refused_in_a_line(folder: Path, given: str) -> None:
    kind, message = REFUSED[given]
    arguments = given if given.startswith("pretrained=") else f"pretrained={folder},{given}"
    with pytest.raises(kind, match=message) as refusal:
        QuickSilverLM.create_from_arg_string("" if given == "pretrained" else arguments, {"batch_size": None})
    assert "\n" not in str(refusal.value)


def test_defaults_of_the_harness_are_no_refusal(folder: Path) -> None:
    made = QuickSilverLM.create_from_arg_obj(
        {"pretrained": str(folder), "batch_size": 4, "parallelize": False, "peft": None, "revision": "main"},
        {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"},
    )
    assert made.batch_size == 4


def test_requests_are_as_long_as_the_engine_takes() -> None:
    longrope = quicksilver.accelerate(tiny.model("llama-rope-longrope"))
    made = QuickSilverLM(longrope, tokenizer=tiny.tokenizer())
    assert made.max_length == longrope.adapter.spec.max_positions < longrope.config.max_position_embeddings


def test_what_is_of_no_use_with_a_loaded_model_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="plan=settled is of no use"):
        QuickSilverLM(model, plan="settled", tokenizer=tiny.tokenizer())


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: Path
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the harness's command with the given --model_args; its own tasks are left out."""
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would keep this test's stderr
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: manager(**given, include_defaults=False))

    def run(model_args: str, *options: str) -> tuple[int, str, str]:
        where = ("--include_path", str(tasks), "--tasks", "choice")
        monkeypatch.setattr(
            sys, "argv", ["lm_eval", "--model", "quicksilver", "--model_args", model_args, *where, *options]
        )
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_the_command_runs_tasks(command: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    status, out, err = command(f"pretrained={folder},plan=settled", "--output_path", str(tmp_path), "--batch_size", "2")
    assert status == 0
    assert "|choice|" in out
    assert "quicksilver: plan settled: " in err
    (results,) = tmp_path.glob("*/results_*.json")
    assert json.loads(results.read_text())["config"]["quicksilver"]["plan"] == "settled"


BEAMS = ("--tasks", "until", "--gen_kwargs", "num_beams=3")


@pytest.mark.parametrize("wrong", [("plan=nosuch",), ("pan=settled",), ("plan=dense", *BEAMS)], ids=lambda w: w[-1])
def test_the_command_refuses_in_a_line(command: Callable[..., Any], folder: Path, wrong: tuple[str, ...]) -> None:
    status, out, err = command(f"pretrained={folder},{wrong[0]}", *wrong[1:])
    assert status == 2
    assert "Traceback" not in out + err
    assert own_lines(err)[-1].startswith("quicksilver: error: ")
