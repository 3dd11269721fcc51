"""Bad input: exit status 2, one line that names the input, no traceback, nothing written. One test per mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from quicksilver.errors import ModelError
from quicksilver.loading.load import resolve_device
from tests.e2e.conftest import DEEP, LONG_NUMBER, SENTENCES, Hub, assert_refusal, run_process

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b" \n\t\n ", "empty"),
        (b"Too short.", "fewer than one window"),
        (b"Latin-1: caf\xe9 au lait", "UTF-8"),
        (b"\xff\xfeU\x00T\x00F\x00", "UTF-8"),
    ],
    ids=["empty", "blank", "short", "latin-1", "utf-16"],
)
def test_texts(refused: Refused, folder: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    text = tmp_path / "bad.txt"
    text.write_bytes(content)
    refused("eval", folder, "--text", text, names=("bad.txt", reason))


@pytest.mark.parametrize("option", ["--text", "--documents"])
def test_a_file_that_is_not_there(refused: Refused, folder: Path, tmp_path: Path, option: str) -> None:
    missing = tmp_path / "missing"
    refused("eval", folder, option, missing, names=(missing, "No such file"))
    refused("eval", folder, option, tmp_path, names=(tmp_path, "directory"))


def test_no_text(refused: Refused, folder: Path) -> None:
    refused("eval", folder, names=("--text", "--documents", "--dataset"))


@pytest.mark.parametrize("other", ["--documents", "--dataset"])
def test_two_texts(refused: Refused, folder: Path, text_file: Path, other: str) -> None:
    refused("eval", folder, "--text", text_file, other, "c4", names=("exactly one", "--text", other))


BAD_LINES = {
    "not JSON": "oh dear",
    "cut off": '{"text": "abc',
    "a list": '["text"]',
    "a string": '"text"',
    "a number": "7",
    "null": "null",
    "no text": '{"body": "abc"}',
    "text is a number": '{"text": 3}',
    "text is null": '{"text": null}',
    "bad escape": '{"text": "\\q"}',
    "quantized without end": DEEP,
    "an endless number": f'{{"text": {LONG_NUMBER}}}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_malformed_line_is_named_by_its_number(refused: Refused, folder: Path, tmp_path: Path, line: str) -> None:
    documents = tmp_path / "documents.jsonl"
    good = json.dumps({"text": SENTENCES})
    documents.write_text(f"{good}\n\n{good}\n{line}\n{good}\n")
    refused("eval", folder, "--documents", documents, names=("documents.jsonl, line 4",))


def test_half_a_character_in_a_document(refused: Refused, folder: Path, tmp_path: Path) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "fine"}\n{"text": "half a \\ud83d smile"}\n')
    refused("eval", folder, "--documents", documents, names=("documents.jsonl",))


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": "  "}\n', '{"text": "x"}\n'])
def test_documents_without_anything_to_score(refused: Refused, folder: Path, tmp_path: Path, content: str) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text(content)
    refused("eval", folder, "--documents", documents, names=("documents.jsonl", "text"))


def test_an_unknown_dataset(refused: Refused, folder: Path) -> None:
    refused("eval", folder, "--dataset", "wikitext-104", names=("wikitext-104", "wikitext-103", "c4"))


@pytest.mark.parametrize("name", ["wikitext-103", "wikitext-2", "c4"])
def test_a_dataset_without_the_hub(refused: Refused, no_hub: Hub, folder: Path, name: str) -> None:
    refused("eval", folder, "--dataset", name, names=(name, "--text", "--documents"))
    assert no_hub.calls == 1  # nobody is kept waiting by others


def test_a_dataset_without_the_package(refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("eval", folder, "--dataset", "c4", names=("c4", "pip install", "--documents"))


@pytest.mark.parametrize(
    "error", [ConnectionError("went away"), ValueError("no such config"), OSError("disk full")], ids=repr
)
def test_a_dataset_whose_download_fails(
    refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("quicksilver.measure.texts.hub_answers", lambda kind, repo_id: None)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))  # an optional package
    refused("eval", folder, "--dataset", "wikitext-2", names=("wikitext-2", str(error), "--text"))


@pytest.mark.parametrize(
    ("model", "calls"), [("gpt2-nowhere", 2), ("someone/some-model", 2), ("not a hub id", 0), ("x" * 300, 0)]
)
def test_a_model_that_the_hub_does_not_give(
    refused: Refused, no_hub: Hub, text_file: Path, model: str, calls: int
) -> None:
    refused("eval", model, "--text", text_file, names=(model,))
    refused("generate", model, "Once", names=(model,))
    assert no_hub.calls == calls


def test_a_hub_that_never_answers(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        limits, ask = [], HfApi.model_info

        def asked(*args: Any, timeout: float, **rest: Any) -> Any:
            limits.append(timeout)
            return ask(*args, timeout=0.3, **rest)

        monkeypatch.setattr(HfApi, "model_info", asked)
        refused("generate", "someone/some-model", "Once", names=("someone/some-model",))
        (limit,) = limits  # asked once
        assert 0.0 < limit <= 10.0


def test_a_context_longer_than_the_models(refused: Refused, folder: Path, text_file: Path) -> None:
    refused("eval", folder, "--text", text_file, "--context", 65, names=("--context 65", "64"))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--stride", 0), ("--stride", "0")),
        (("--stride", -4), ("--stride", "-4")),
        (("--stride", "half"), ("--stride", "half")),
        (("--stride", 33, "--context", 32), ("stride", "33", "32")),
        (("--context", 1), ("--context", "1")),
        (("--context", 0), ("--context", "0")),
        (("--max-tokens", 1), ("--max-tokens", "1")),
        (("--max-tokens", 31, "--context", 32), ("book.txt", "31", "32")),
        (("--mode", "guess"), ("--mode", "guess", "score", "decode")),
        (("--dtype", "int8"), ("--dtype", "int8", "float32")),
        (("--threads", 0), ("--threads", "0")),
        (("--device", "abacus"), ("abacus",)),
        (("--plam", "paper"), ("--plam",)),
        (("--threads", 10**30), ("--threads",)),
        (("--device", "meta"), ("meta",)),
        (("--device", "mps"), ("mps",)),
        (("--device", "xpu"), ("xpu",)),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_options_of_eval(
    refused: Refused, folder: Path, text_file: Path, options: tuple[Any, ...], names: tuple[str, ...]
) -> None:
    refused("eval", folder, "--text", text_file, *options, names=names)


def test_cuda_without_a_gpu(refused: Refused, folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        refused("eval", folder, "--text", text_file, "--device", device, names=("cuda", "GPU"))
        refused("generate", folder, "Once", "--device", device, names=("cuda", "GPU"))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ModelError, match="cuda:7"):
        resolve_device("cuda:7")


def test_json_into_a_folder_that_is_not_there(refused: Refused, folder: Path, text_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "out.json"
    refused("eval", folder, "--text", text_file, "--json", target, names=(target, "folder"))
    assert not target.parent.exists()
    refused("eval", folder, "--text", text_file, "--json", tmp_path, names=(tmp_path, "directory"))


@pytest.mark.parametrize("command", ["eval", "plan fit", "quantize"])
def test_an_empty_name_of_an_output(refused: Refused, folder: Path, text_file: Path, command: str) -> None:
    arguments = {
        "eval": ("eval", folder, "--text", text_file, "--json", ""),
        "plan fit": ("plan", "fit", folder, "channel-5bit", "-o", ""),
        "quantize": ("quantize", folder, "-o", ""),
    }
    refused(*arguments[command], names=("empty",))


def test_calibration_of_no_use(refused: Refused, folder: Path, text_file: Path, tmp_path: Path) -> None:
    for plan in ("settled", "uniform-4bit"):
        for text in (text_file, tmp_path / "missing.txt"):
            options = ("--plan", plan, "--calibration", text)
            refused("eval", folder, "--text", text_file, *options, names=("--calibration", text, "no use"))
    target = tmp_path / "new"
    options = ("-o", target, "--calibration-tokens", 100)
    refused("quantize", folder, *options, names=("--calibration-tokens", "--calibration"))
    assert not target.exists()


def test_a_calibration_text_that_is_not_there(refused: Refused, folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--plan", "channel-5bit", "--calibration", tmp_path / "missing.txt")
    refused("eval", folder, "--text", text_file, *options, names=("missing.txt", "No such file"))


@contextmanager
def forbidden(monkeypatch: pytest.MonkeyPatch, place: Path) -> Iterator[None]:
    """Refuse every look at a place, or below it, as the system does where a folder may not be entered."""
    names = ("stat", "access", "open")
    real = {name: getattr(os, name) for name in names}

    def refuse(name: str, path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, (str, Path)) and Path(path).is_relative_to(place):
            if name == "access":
                return False
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real[name](path, *args, **kwargs)

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, partial(refuse, name))
        yield


def test_what_may_not_be_read_or_written(
    refused: Refused, folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is permission, not that nothing is there."""
    secret, model = tmp_path / "secret", tmp_path / "model"
    secret.mkdir()
    shutil.copytree(folder, model)
    with forbidden(monkeypatch, secret):
        for arguments in (
            ("generate", secret / "model", "Once"),
            ("plan", "validate", secret / "plan.json"),
            ("plan", "fit", folder, "channel-5bit", "-o", secret / "plan.json"),
            ("quantize", folder, "-o", secret / "new"),
            ("eval", folder, "--text", text_file, "--json", secret / "out.json"),
        ):
            refused(*arguments, names=(secret, "Permission denied"))
    for name in ("config.json", "model.safetensors"):
        with forbidden(monkeypatch, model / name):
            refused("generate", model, "Once", names=(model / name, "Permission denied"))


def test_an_older_result_survives_a_refusal(refused: Refused, folder: Path, tmp_path: Path, text_file: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    refused("eval", folder, "--text", text_file, "--context", 65, "--json", target, names=("65",))
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--top-k", 5), ("--top-k", "--temperature")),
        (("--top-p", 0.9), ("--top-p", "--temperature")),
        (("--temperature", -1), ("--temperature", "-1")),
        (("--temperature", "hot"), ("--temperature", "hot")),
        (("--temperature", 1, "--top-p", 0), ("--top-p", "0")),
        (("--temperature", 1, "--top-p", 1.5), ("--top-p", "1.5")),
        (("--temperature", 1, "--top-k", 0), ("--top-k", "0")),
        (("--max-new-tokens", 0), ("--max-new-tokens", "0")),
        (("--seed", "lucky"), ("--seed", "lucky")),
        (("--temperature", "nan"), ("--temperature", "nan")),
        (("--temperature", 1, "--top-p", "nan"), ("--top-p", "nan")),
        (("--temperature", 1, "--seed", 10**30), ("--seed",)),
        (("--temperature", 1e-40), ("--temperature",)),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_options_of_generate(refused: Refused, folder: Path, options: tuple[Any, ...], names: tuple[str, ...]) -> None:
    refused("generate", folder, "Once", "--max-new-tokens", 3, *options, names=names)


@pytest.mark.parametrize("length", [64, 100])
def test_a_prompt_longer_than_the_context(refused: Refused, folder: Path, length: int) -> None:
    refused("generate", folder, "y" * length, names=("prompt", str(length), "64"))


def test_an_empty_prompt(refused: Refused, folder: Path) -> None:
    refused("generate", folder, "", names=("prompt is empty",))
    refused("generate", folder, "-", stdin=b"", names=("prompt is empty",))


def test_a_prompt_that_is_not_utf8(refused: Refused, folder: Path) -> None:
    refused("generate", folder, "-", stdin=b"caf\xe9", names=("stdin", "UTF-8"))


def test_a_prompt_argument_that_is_not_utf8(refused: Refused, folder: Path) -> None:
    refused("generate", folder, b"caf\xe9".decode("utf-8", "surrogateescape"), names=("prompt", "UTF-8"))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("evaluate",), ("evaluate",)),
        (("eval",), ("MODEL",)),
        (("generate", "model"), ("PROMPT",)),
        (("plan", "shew", "paper"), ("shew",)),
        (("plan", "show"), ("PLAN",)),
        (("models", "all"), ("all",)),
        (("--loud",), ("--loud",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_commands_that_do_not_exist(refused: Refused, arguments: tuple[str, ...], names: tuple[str, ...]) -> None:
    refused(*arguments, names=names)


def test_demo_options(refused: Refused, folder: Path, tmp_path: Path, text_file: Path) -> None:
    refused("demo", "--output", text_file, "--model", folder, names=(text_file, "folder"))
    refused("demo", "--max-tokens", 10, names=("--max-tokens", "10"))
    refused("demo", "--output", tmp_path / "new", "--model", tmp_path / "nowhere", names=("nowhere",))
    assert not (tmp_path / "new").exists()


def test_without_a_hub_as_a_process(folder: Path, tmp_path: Path, dead_hub: Hub) -> None:
    arguments = ("--dataset", "wikitext-103", "--json", tmp_path / "out.json")
    outcome = run_process("eval", folder, *arguments, HF_ENDPOINT=dead_hub.endpoint)
    assert dead_hub.calls == 1
    assert_refusal(outcome, "wikitext-103", "--text")
    assert list(tmp_path.iterdir()) == []
