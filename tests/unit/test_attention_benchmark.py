"""The benchmark of attention alone: it compares before it measures, and says of what its figures are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import attention
from quicksilver.ops import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there are no compiled kernels")
QUICK = ["--shapes", "ref-llama", "--entries", "20", "--repeats", "1", "--warmup", "0", "--threads", "1"]


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_COLD_BYTES", 1)


def test_every_engine_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attention.main([*QUICK, "--output", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["torch-sdpa", "kernels-32", "kernels-16", "kernels-8"]
    assert all(row["baseline"] == "torch-sdpa" and row["entries"] == 20 and row["layers"] == 2 for row in rows)
    assert rows[0]["ratio_to_baseline"] == 1.0
    assert capsys.readouterr().out.startswith("ref-llama, 20 entries: torch-sdpa")


def test_what_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_TOLERANCE", {32: 0.0, 16: 0.0, 8: 0.0})
    with pytest.raises(SystemExit, match="ref-llama, 20 entries of 32 bits: attended values are off by"):
        attention.main([*QUICK, "--output", str(tmp_path / "rows.jsonl")])
    assert not (tmp_path / "rows.jsonl").exists()
