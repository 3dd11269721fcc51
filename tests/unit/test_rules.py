"""How rules register, and what the runtime makes of decisions that are not the package's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from quicksilver import rules
from quicksilver.errors import PlanError
from quicksilver.families.cost import executed_cost
from quicksilver.plan import Plan
from quicksilver.rules.registry import RuleTypes
from tests import tiny, tolerances
from tests.engines import decoder, fusion_plan, halting_plan, precision_plan, run_whole


@rules.halting_rule("test-answering")
@dataclass(frozen=True)
class Answering(rules.HaltingRule):
    """Gives one of `ANSWERS`."""

    answer: str

    def decide(self, view: rules.LayerView) -> Any:
        return ANSWERS[self.answer](view)


@rules.halting_rule("test-comparing")
@dataclass(frozen=True)
class Comparing(rules.ThresholdRule):
    """Halts where successive updates are less alike than the threshold."""

    @property
    def reads_previous_update(self) -> bool:
        return True

    def may_halt(self, layer_idx: int, first: int | None = None) -> bool:
        return layer_idx == 1

    def decide(self, view: rules.LayerView) -> rules.HaltDecision:
        assert view.layer_idx == 1
        assert view.previous_update is not None
        cosine = torch.cosine_similarity(view.after - view.before, view.previous_update, dim=-1)
        return rules.HaltDecision(cosine < rules.threshold_at(self.threshold, 1), {"cosine": view.num_rows})


BAD: dict[str, tuple[Callable[[rules.LayerView], Any], str]] = {
    "a tensor": (lambda view: view.positions < 2, "must return a HaltDecision, got Tensor"),
    "nothing": (lambda view: None, "must return a HaltDecision, got NoneType"),
    "a list": (lambda view: rules.HaltDecision([True]), "one boolean for each of 10 tokens, got list"),  # type: ignore[arg-type]
    "numbers": (lambda view: rules.HaltDecision(view.positions), "got torch.int64 of shape"),
    "one for all": (lambda view: rules.HaltDecision((view.positions < 2).any()), r"got torch.bool of shape \(\)"),
    "two for each": (lambda view: rules.HaltDecision(view.after[:, :2] > 0), r"shape \(10, 2\)"),
    "a signal of its own": (
        lambda view: rules.HaltDecision(view.positions < 0, {"guess": 1}),
        "counts a signal 'guess'; signals are norm, cosine, softmax, head; count others as macs",
    ),
    "signals without names": (
        lambda view: rules.HaltDecision(view.positions < 0, [3]),  # type: ignore[arg-type]
        r"must count signal_rows by name, as in {'norm': 1}, got list",
    ),
    "fewer than no rows": (
        lambda view: rules.HaltDecision(view.positions < 0, {"norm": -1}),
        r"must count signal_rows\['norm'\] as a whole number, 0 or more, got -1",
    ),
    "work that is given back": (
        lambda view: rules.HaltDecision(view.positions < 0, macs=-(10**9)),
        "must count macs as a whole number, 0 or more, got -1000000000",
    ),
    "half a product": (lambda view: rules.HaltDecision(view.positions < 0, macs=0.5), "macs as .* got 0.5"),  # type: ignore[arg-type]
    "rows of a gate, as text": (
        lambda view: rules.HaltDecision(view.positions < 0, gate_rows="all"),  # type: ignore[arg-type]
        "gate_rows as a whole number, 0 or more, got 'all'",
    ),
    "an error of its own": (lambda view: view.after @ view.after, "failed: RuntimeError: mat1 and mat2"),
    "an attribute that is none": (lambda view: view.colour, "failed: AttributeError: .*colour"),  # type: ignore[attr-defined]
}
ANSWERS = {name: answer for name, (answer, _) in BAD.items()}
ANSWERS["nobody, for 70 each"] = lambda view: rules.HaltDecision(view.positions < 0, macs=70 * view.num_rows)
ANSWERS["nobody"] = lambda view: rules.HaltDecision(view.positions < 0)


@rules.fusion_rule("test-pairing")
@dataclass(frozen=True)
class Pairing(rules.FusionRule):
    """Gives one of `PAIRS`."""

    answer: str

    def decide(self, view: rules.PairView) -> Any:
        return PAIRS[self.answer](view)


BAD_PAIRS: dict[str, tuple[Callable[[rules.PairView], Any], str]] = {
    "a tensor": (lambda view: view.positions < 2, "must return a FusionDecision, got Tensor"),
    "numbers": (lambda view: rules.FusionDecision(view.positions), "one boolean for each of 9 pairs, got torch.int64"),
    "one for all": (lambda view: rules.FusionDecision((view.positions < 2).any()), r"of shape \(\)"),
    "the head": (lambda view: rules.FusionDecision(view.positions < 0, {"head": 1}), "signals are norm, cosine;"),
}
PAIRS = {name: answer for name, (answer, _) in BAD_PAIRS.items()}
PAIRS["all, for 70 each"] = lambda view: rules.FusionDecision(view.positions >= 0, macs=70 * view.num_pairs)
PAIRS["all"] = lambda view: rules.FusionDecision(view.positions >= 0)


@rules.halting_rule("test-choosy")
@dataclass(frozen=True)
class Choosy(Comparing):
    """Refuses every value, in an ordinary exception of two lines."""

    def __post_init__(self) -> None:
        raise ValueError(f"threshold is\n{self.threshold}")


@dataclass(frozen=True)
class Undecided(rules.HaltingRule):
    """Lacks its decision."""


class Plain(Comparing):
    """No dataclass of its own."""


@dataclass(frozen=True)
class Typed(Comparing):
    """Has the key that names it."""

    type: str = "x"


@pytest.fixture
def types() -> RuleTypes[rules.HaltingRule]:
    """A registry of its own."""
    return RuleTypes("halting rule", rules.HaltingRule)


@pytest.mark.parametrize(
    ("name", "cls", "said"),
    [
        ("mine", Undecided, "Undecided lacks decide"),
        ("mine", Plain, "put @dataclass"),
        ("mine", Typed, "no field of Typed may be called 'type'"),
        ("mine", rules.L2FusionRule, "must be a class derived from HaltingRule"),
        ("mine", lambda view: None, "must be a class derived from HaltingRule"),
        ("any", Comparing, "the name 'any': halting rule 'any' is retired"),
        ("", Comparing, "not empty"),
        (Comparing, Comparing, "must be a string"),
    ],
)
def test_what_cannot_be_registered(types: RuleTypes[rules.HaltingRule], name: Any, cls: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        types.register(name)(cls)
    assert types.classes() == set()


def test_a_name_has_one_class_and_a_class_one_name(types: RuleTypes[rules.HaltingRule]) -> None:
    assert types.register("comparing")(Comparing) is Comparing
    assert types.register("comparing")(Comparing) is Comparing
    assert (types.get("comparing"), types.name_of(Comparing), list(types)) == (Comparing, "comparing", ["comparing"])
    with pytest.raises(PlanError, match="Comparing already; Answering needs another name"):
        types.register("comparing")(Answering)
    with pytest.raises(PlanError, match="is the halting rule 'comparing' already, and cannot be 'again' too"):
        types.register("again")(Comparing)


def test_a_class_that_is_defined_again_takes_its_own_place(types: RuleTypes[rules.HaltingRule]) -> None:
    def define() -> type[rules.HaltingRule]:
        @types.register("again")
        @dataclass(frozen=True)
        class Again(Comparing):
            pass

        return Again

    define()
    second = define()
    assert types.classes() == {second}


def test_a_rule_without_a_name_is_not_written() -> None:
    with pytest.raises(PlanError, match=r"Plain has no name that a plan could give: put @halting_rule\(NAME\)"):
        _ = halting_plan(Plain(0.0)).hash
    with pytest.raises(PlanError, match="Plain has no name"):
        Plan("a", rules.HaltingConfig(rules.AllRule((Plain(0.0),)))).to_dict()


def test_rules_hold_rules_by_the_fields_that_they_name() -> None:
    plan = halting_plan(rules.AllRule((rules.AllRule((Comparing(0.5), Answering("nobody"))), rules.DriftRule(1.0))))
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in all"])
def test_it_sees_what_it_asks_for_where_it_asks(wrapped: bool) -> None:
    rule = Comparing(2.0)
    run = run_whole(
        decoder(tiny.model("llama"), halting_plan(rules.AllRule((rule,)) if wrapped else rule)), tiny.token_ids(12)
    )
    assert run.trace.depths[0].tolist() == [2] * 12
    assert [layer.signal_rows["cosine"] for layer in run.trace.layers] == [0, 12, 0, 0]


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in all"])
def test_multiply_adds_of_its_own_are_counted(wrapped: bool) -> None:
    costs = []
    for answer in ("nobody", "nobody, for 70 each"):
        rule = Answering(answer)
        plan = halting_plan(rules.AllRule((rules.DriftRule(1e9), rule)) if wrapped else rule)
        engine = decoder(tiny.model("gpt2"), plan)
        costs.append(executed_cost(engine.spec, run_whole(engine, tiny.token_ids(10)).trace))
    assert costs[1].body_macs - costs[0].body_macs == 70 * 10 * 3  # nothing is asked after the last of four layers
    assert costs[1].bitops - costs[0].bitops == 70 * 10 * 3 * 32 * 32


@pytest.mark.parametrize(("answer", "said"), [(name, said) for name, (_, said) in BAD.items()], ids=list(BAD))
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in all"])
def test_what_is_no_decision_is_refused(answer: str, said: str, wrapped: bool) -> None:
    rule: rules.HaltingRule = Answering(answer)
    engine = decoder(tiny.model("gpt2"), halting_plan(rules.AllRule((rule,)) if wrapped else rule))
    with pytest.raises(PlanError, match=rf"Answering\.decide .*{said}"):
        run_whole(engine, tiny.token_ids(10))


@pytest.mark.parametrize(
    ("answer", "said"), [(name, said) for name, (_, said) in BAD_PAIRS.items()], ids=list(BAD_PAIRS)
)
def test_what_is_no_decision_about_pairs_is_refused(answer: str, said: str) -> None:
    engine = decoder(tiny.model("gpt2"), fusion_plan(Pairing(answer)))
    with pytest.raises(PlanError, match=rf"Pairing\.decide .*{said}"):
        run_whole(engine, tiny.token_ids(10))


def test_multiply_adds_of_a_similarity_are_counted() -> None:
    costs = []
    for answer in ("all", "all, for 70 each"):
        plan = fusion_plan(Pairing(answer))
        assert Plan.from_dict(plan.to_dict()) == plan
        engine = decoder(tiny.model("gpt2"), plan)
        costs.append(executed_cost(engine.spec, run_whole(engine, tiny.token_ids(10)).trace))
    assert costs[1].body_macs - costs[0].body_macs == 70 * 9


def test_a_similarity_without_a_name_is_not_written() -> None:
    class Nameless(rules.CosineFusionRule):
        pass

    with pytest.raises(PlanError, match=r"Nameless has no name that a plan could give: put @fusion_rule\(NAME\)"):
        _ = fusion_plan(Nameless(0.5)).hash


def test_a_value_that_a_rule_refuses_in_its_own_words() -> None:
    rule = {"type": "test-choosy", "threshold": 1.0}
    with pytest.raises(PlanError, match=r"^mine: halting\.rule: threshold is$"):
        Plan.from_dict({"version": 2, "halting": {"rule": rule}}, "mine")


BAD_BITS: dict[str, tuple[Callable[[rules.ChannelView], Any], str]] = {
    "a tensor": (lambda view: view.inputs > 0, "must return a BitsChoice, got Tensor"),
    "five": (lambda view: rules.BitsChoice(5), r"0, 2, 4, 6 or 8 bits, or torch.uint8 bits of shape .*, got 5"),
    "booleans": (lambda view: rules.BitsChoice(view.inputs > 0), "got torch.bool of shape"),
    "one tensor for all": (lambda view: rules.BitsChoice(torch.tensor(8, dtype=torch.uint8)), r"of shape \(\)"),
    "fives": (lambda view: rules.BitsChoice(torch.full(view.inputs.shape, 5, dtype=torch.uint8)), r"got \[5\]"),
    "a norm": (lambda view: rules.BitsChoice(8, {"norm": 1}), "signals are head, softmax, score; count others"),
}
BITS = {name: answer for name, (answer, _) in BAD_BITS.items()}
BITS["a colour"] = lambda view: rules.BitsChoice(8)
BITS["four"] = lambda view: rules.BitsChoice(4)
BITS["four, for 70 each"] = lambda view: rules.BitsChoice(4, macs=70 * view.inputs.shape[0])


@rules.precision_rule("test-bits")
@dataclass(frozen=True)
class Bits(rules.PrecisionRule):
    """Gives one of `BITS`; says nothing of what kernels may do in its stead."""

    answer: str

    def decide(self, view: rules.ChannelView) -> Any:
        return BITS[self.answer](view)


@rules.precision_rule("test-granting")
@dataclass(frozen=True)
class Granting(Bits):
    """Grants every second token 4 bits after the first layer, or what it is asked for."""

    def after_layer(self, num_layers: int) -> int:
        return 0

    def decide_tokens(self, view: rules.TokenBitsView) -> Any:
        granted = torch.full((len(view.hidden),), 8, dtype=torch.uint8)
        granted[::2] = 4
        if self.answer == "a colour":
            return view.colour  # type: ignore[attr-defined]
        return rules.BitsChoice(granted if self.answer == "granted" else 4, macs=7)


BITS["granted"] = lambda view: rules.BitsChoice(8 if view.max_bits is None else view.max_bits)


@rules.fill_rule("test-alternating")
@dataclass(frozen=True)
class Alternating(rules.FillRule):
    """Leaves entries in every second layer."""

    def decide(self, view: int) -> rules.Fill:
        return rules.Fill.PROJECT if view % 2 else rules.Fill.NONE


@rules.fill_rule("test-filling")
@dataclass(frozen=True)
class Filling(rules.FillRule):
    """Says nothing that could be filled in."""

    def decide(self, view: int) -> Any:
        return "zero"


@pytest.mark.parametrize(("answer", "said"), [(name, said) for name, (_, said) in BAD_BITS.items()], ids=list(BAD_BITS))
def test_what_is_no_choice_of_bits_is_refused(answer: str, said: str) -> None:
    engine = decoder(tiny.quantized("gpt2"), precision_plan(Bits(answer)), kernels="auto")
    with pytest.raises(PlanError, match=rf"Bits\.decide .*{said}"):
        run_whole(engine, tiny.token_ids(10))


def test_bits_for_all_tokens_are_none_for_each() -> None:
    with pytest.raises(PlanError, match=r"Granting\.decide must give torch.uint8 bits of shape \[10\], got 4"):
        run_whole(decoder(tiny.quantized("gpt2"), precision_plan(Granting("four"))), tiny.token_ids(10))


def test_a_rule_that_fails_to_grant_bits_is_named() -> None:
    with pytest.raises(PlanError, match=r"Granting\.decide_tokens failed: AttributeError: .* 'colour'"):
        run_whole(decoder(tiny.quantized("gpt2"), precision_plan(Granting("a colour"))), tiny.token_ids(10))


@pytest.mark.usefixtures("rounding_as_kernels")
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_a_precision_rule_that_kernels_do_not_know_runs_map_by_map(kernels: Any) -> None:
    plan, ids = precision_plan(Bits("four")), tiny.token_ids(10)
    assert Plan.from_dict(plan.to_dict()) == plan
    ours = run_whole(decoder(tiny.quantized("llama"), precision_plan(rules.UniformBitsRule(4)), "torch"), ids)
    run = run_whole(decoder(tiny.quantized("llama"), plan, kernels), ids)
    torch.testing.assert_close(run.logits, ours.logits, atol=tolerances.KERNEL_LOGITS, rtol=0)
    assert run.trace.macs_by_bits == ours.trace.macs_by_bits


def test_bits_that_a_rule_grants_to_tokens_are_read_from_the_next_layer_on() -> None:
    engine = decoder(tiny.quantized("llama"), precision_plan(Granting("granted")))
    layers = run_whole(engine, tiny.token_ids(10)).trace.layers
    assert layers[0].macs_by_bits[4] == 0
    assert all(layer.macs_by_bits[4] == layer.macs_by_bits[8] > 0 for layer in layers[1:])
    assert [layer.rule_macs for layer in layers] == [7, 0, 0, 0]


def test_multiply_adds_of_a_choice_of_bits_are_counted() -> None:
    costs = []
    for answer in ("four", "four, for 70 each"):
        engine = decoder(tiny.quantized("gpt2"), precision_plan(Bits(answer)))
        costs.append(executed_cost(engine.spec, run_whole(engine, tiny.token_ids(10)).trace))
    assert costs[1].body_macs - costs[0].body_macs == 70 * 10 * 4 * 6  # four layers of six maps


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_a_fill_of_ones_own_may_differ_from_layer_to_layer(kernels: Any) -> None:
    plan = halting_plan(rules.ForcedRule((1, 4)), Alternating())
    assert Plan.from_dict(plan.to_dict()) == plan
    cache = run_whole(decoder(tiny.quantized("llama"), plan, kernels), tiny.token_ids(10)).cache
    assert [len(cache.entries(i, 0).positions) for i in range(4)] == [10, 10, 5, 10]


def test_what_is_no_fill_is_refused() -> None:
    with pytest.raises(PlanError, match=r"Filling\.decide must return a Fill, got str"):
        run_whole(decoder(tiny.model("gpt2"), halting_plan(rules.ForcedRule((1,)), Filling())), tiny.token_ids(3))
