"""A calibration's section of a results page: which candidate stands for a group, and what is said of it."""

from __future__ import annotations

from typing import Any

from benchmarks.frontier import markdown

_SHARES = ("flops", "flops_body", "bitops", "weight_bytes", "kv_used_bytes")


def scored(group: str, saved: float, nll: float, upper: float) -> dict[str, Any]:
    delta = {"nll": nll, "nll_ci95": [nll, upper], "ppl_ci95": [20 * nll, 20 * upper]}
    shares = {f"{name}_reduction{'_8bit' if name in ('bitops', 'weight_bytes') else ''}": saved for name in _SHARES}
    return {
        "group": group,
        "saved": saved,
        "delta": delta,
        "delta_by_text": {"one": delta, "other": delta},
        "dense_bits_per_byte": 1.5,
        "mean_depth": 12.0,
        **shares,
    }


def verified(saved: float, nll: float, upper: float) -> dict[str, Any]:
    row = scored("together", saved, nll, upper)
    shares = {name: value for name, value in row.items() if "_reduction" in name}
    sides = {"dense": {"bits_per_byte": 1.25}, "accelerated": {"mean_depth": 11.5}}
    return {**sides, "delta": row["delta"] | shares, "delta_by_text": row["delta_by_text"]}


def found(
    *candidates: dict[str, Any],
    held: dict[str, Any] | None = None,
    failed: tuple[dict[str, Any], ...] = (),
    without: tuple[dict[str, Any], ...] = (),
    unit: str = "nll",
) -> dict[str, Any]:
    environment = {"quicksilver": "0", "torch": "2", "transformers": "5", "cpu": "some", "threads": 1}
    return {
        "model": "ref-llama",
        "command": "quicksilver calibrate ref-llama",
        "budget": {"limit": 0.01, "unit": unit},
        "parts": {"fit_tokens": 1, "search_tokens": 2, "held_out_tokens": 3},
        "protocol": {"context": 8, "stride": 4},
        "environment": environment,
        "candidates": list(candidates),
        "leave_one_out": list(without),
        "verification": {"held": held, "failed": list(failed)},
    }


def test_the_group_is_shown_by_what_saves_most_inside_the_budget() -> None:
    inside, more, outside = (
        scored("together", 0.1, 0.004, 0.009),
        scored("together", 0.2, 0.006, 0.01),
        scored("together", 0.3, 0.008, 0.02),
    )
    text = markdown(found(inside, more, outside))
    assert "| all together | +0.0060 [+0.0060, +0.0100] | +20.0 % |" in text
    assert "+30.0 %" not in text


def test_a_group_outside_the_budget_is_shown_by_what_loses_least_and_said_to_be_outside() -> None:
    text = markdown(found(scored("paper", 0.3, 0.05, 0.06), scored("paper", 0.1, 0.04, 0.05)))
    assert "| paper, thresholds tuned (outside the budget) | +0.0400 [+0.0400, +0.0500] | +10.0 % |" in text


def test_one_text_outside_is_outside() -> None:
    each = scored("channels", 0.2, 0.004, 0.009)
    each["delta_by_text"]["other"] = {"nll": 0.004, "nll_ci95": [0.0, 0.02], "ppl_ci95": [0.0, 0.4]}
    assert "precision: channels skipped (outside the budget)" in markdown(found(each))


def test_what_held_on_held_out_text_and_what_each_mechanism_gave_are_rows() -> None:
    text = markdown(
        found(
            scored("together", 0.1, 0.004, 0.009),
            held=verified(0.15, 0.005, 0.008),
            without=({"without": "skipping", **scored("", 0.05, 0.003, 0.006)},),
        )
    )
    assert "1.500 bits per byte on the searched part and 1.250 on the held-out one;" in text
    assert "| **chosen, on held-out text** | +0.0050 [+0.0050, +0.0080] | +15.0 % |" in text
    assert "| chosen, without skipping | +0.0030 [+0.0030, +0.0060] | +5.0 % |" in text


def test_what_did_not_hold_is_named_with_the_text_that_it_lost_most_on() -> None:
    failed = verified(0.3, 0.02, 0.03)
    failed["delta_by_text"]["other"] = {"nll": 0.04, "nll_ci95": [0.04, 0.05], "ppl_ci95": [0.8, 1.0]}
    text = markdown(found(scored("together", 0.1, 0.004, 0.009), failed=(failed,)))
    assert "not held there: +30.0 % in the layers at +0.0400 [+0.0400, +0.0500] on other." in text
    assert "No plan held on the held-out text" in text


def test_a_budget_of_perplexity_is_held_by_perplexity() -> None:
    text = markdown(found(scored("together", 0.1, 0.0, 0.009), unit="ppl"))
    assert "+0.010 perplexity" in text
    assert "all together (outside the budget)" in text
