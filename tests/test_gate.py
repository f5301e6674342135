"""The gate keeps its word: one policy in three places, intervals that cover, conditions that fail for their reason only."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkout import Checkout
from pydantic import ValidationError

from titanic_mlops.face.gate_commands import _condition_lines
from titanic_mlops.flow.configuration import load
from titanic_mlops.flow.steps import notebook_of, parameters_model, plan, unread_parameters
from titanic_mlops.ground.errors import ContractError, ParameterError
from titanic_mlops.model.conditions import (
    age_condition,
    agreement_condition,
    bad_weights,
    calibration_slope,
    contract_condition,
    data_age,
    fairness_condition,
    fairness_gaps,
    leak_conditions,
    population_condition,
    population_distances,
    slice_condition,
    slope_condition,
    stability_condition,
    too_good_condition,
)
from titanic_mlops.model.evaluate import Estimate
from titanic_mlops.model.gate import (
    Condition,
    Decision,
    Override,
    Policy,
    compare,
    decide,
    effect,
    ticket_interval,
)

# --- one policy


def test_policy_is_the_same_in_code_configuration_and_notebook():
    default, configured = Policy().model_dump(), load([])[0].gate.model_dump()
    assert configured == default
    fields = parameters_model(notebook_of("promote")).model_fields
    assert {name: fields[name].default for name in default} == default
    job = next(job for job in plan(load(["gate.margin=0.01"])[0]) if job.step == "promote")
    assert load(["gate.policy=2"])[0].gate.policy == "2"
    assert job.parameters["margin"] == 0.01


def test_another_value_is_another_policy_whatever_it_is_called():
    from titanic_mlops.model.registry import _gate

    versions = {_gate(decide([_condition(True)], None, policy=p)) for p in (Policy(), Policy(fairness=1.0))}
    assert len(versions) == 2 and all(len(version.split()) == 3 for version in versions)
    assert decide([_condition(True)], None, policy=Policy()).policy == Policy().version


@pytest.mark.parametrize(
    "module", ["model/gate.py", "model/conditions.py", "model/evaluate.py", "data/leaks.py"]
)
def test_another_condition_is_another_gate(tmp_path: Path, module: str):
    import shutil

    import titanic_mlops
    from titanic_mlops.model.lineage import gate_digest

    package = Path(shutil.copytree(Path(titanic_mlops.__file__).parent, tmp_path / "titanic_mlops"))
    assert gate_digest(package) == gate_digest()
    (package / module).write_text((package / module).read_text() + "# another threshold\n")
    assert gate_digest(package) != gate_digest()


def test_promote_reads_every_parameter():
    assert unread_parameters(notebook_of("promote")) == []


@pytest.mark.parametrize(
    "override",
    [
        "gate.inconclusive=perhaps",
        "gate.false_alarms=0",
        "gate.fairnes=0.1",
        "gate.beats=luck",
        "gate.slope_low=2",
        "gate.margin=inf",
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(override: str):
    with pytest.raises(ParameterError, match="gate"):
        load([override])


# --- the interval and the verdict


def test_interval_is_as_wide_as_tickets_make_it():
    random = np.random.default_rng(0)
    one_each = random.normal(size=100)
    alone, _ = ticket_interval(one_each, np.arange(100))
    copied, _ = ticket_interval(np.repeat(one_each, 4), np.repeat(np.arange(100), 4))
    naive, _ = ticket_interval(np.repeat(one_each, 4), np.arange(400))
    width = lambda e: e.high - e.low
    assert width(copied) == pytest.approx(width(alone))  # copies on the same ticket are no news
    assert width(naive) < 0.6 * width(copied)


@pytest.mark.parametrize(("factor", "least"), [(1.0, 0.4), (1.5, 0.75), (0.6, 0.75)])
def test_the_interval_of_a_calibration_error_holds_the_figure_and_the_truth(factor: float, least: float):
    from titanic_mlops.model.evaluate import BINS, ece_by_chance, estimate

    random, covered, shown, trials = np.random.default_rng(5), 0, [], 80
    for _ in range(trials):
        z = random.normal(0, 1.5, 250)
        truth, p = (1 / (1 + np.exp(-slope * z)) for slope in (1, factor))
        bins = np.minimum((p * BINS).astype(int), BINS - 1)
        distance = np.abs(np.bincount(bins, p - truth)).sum() / len(p)
        y = (random.random(len(p)) < truth).astype(int)
        ece = estimate(y, p, np.arange(len(p)), draws=200)["ece"]
        assert 0 <= ece.low <= ece.value <= ece.high
        covered += ece.low <= distance <= ece.high
        shown.append(ece.value)
    assert covered / trials >= least  # the percentiles cover a truth of 0 never
    if factor == 1:
        assert ece_by_chance(p) == pytest.approx(np.median(shown), abs=0.01)


def test_interval_needs_tickets():
    with pytest.raises(ContractError, match="3 tickets"):
        ticket_interval(np.ones(10), np.zeros(10))


@pytest.mark.parametrize("tail", [2.5, 30])
def test_interval_covers_the_truth(tail: float):
    # Families of one to eight whose losses have heavy tails, as log losses have.
    random, missed, trials = np.random.default_rng(1), 0, 1000
    for _ in range(trials):
        size = random.integers(1, 9, 60)
        ticket = np.repeat(np.arange(60), size)
        values = np.repeat(random.standard_t(tail, 60), size) + random.normal(size=len(ticket))
        found, _ = ticket_interval(values, ticket)
        missed += not found.low <= 0 <= found.high
    assert missed / trials <= 0.065  # 5 % promised, and 2 standard errors of the count


def test_equal_models_are_inconclusive_and_order_does_not_matter():
    random = np.random.default_rng(2)
    y, p, q = random.integers(0, 2, 90), random.uniform(0.1, 0.9, 90), random.uniform(0.1, 0.9, 90)
    ticket = np.arange(90) // 2
    same = compare(y, p, p, ticket)
    assert same.verdict == "inconclusive" and same.difference.value == 0 and same.changed == 0
    there, back = compare(y, p, q, ticket), compare(y, q, p, ticket)
    assert there.difference.value == pytest.approx(-back.difference.value)
    shuffled = random.permutation(90)
    again = compare(y[shuffled], p[shuffled], q[shuffled], ticket[shuffled])
    assert again.difference.low == pytest.approx(there.difference.low)
    assert there.detectable > (there.difference.high - there.difference.low) / 2


# --- what the policy does


def _comparison(verdict: str, value: float, reach: float):
    random = np.random.default_rng(3)
    found = compare(np.array([0, 1] * 10), random.uniform(size=20), random.uniform(size=20), np.arange(20))
    return found.model_copy(
        update={
            "verdict": verdict,
            "difference": Estimate(value=value, low=value - reach, high=value + reach),
        }
    )


@pytest.mark.parametrize(
    ("verdict", "does", "smaller", "newer", "promoted"),
    [
        ("better", "promote", False, False, True),
        ("better", "keep", True, True, False),
        ("worse", "keep", True, True, False),
        ("inconclusive", "smaller or newer", False, False, False),
        ("inconclusive", "smaller or newer", True, False, True),
        ("inconclusive", "smaller or newer", False, True, True),
        ("inconclusive", "keep", True, True, False),
        ("inconclusive", "promote", False, False, True),
    ],
)
def test_policy_says_what_a_verdict_does(verdict: str, does: str, smaller: bool, newer: bool, promoted: bool):
    policy = Policy(**{verdict: does})
    assert effect(policy, _comparison(verdict, 0.0, 0.01), smaller, newer)[0] == promoted


def test_an_inconclusive_model_that_might_be_much_worse_stays_out():
    promoted, reason = effect(Policy(), _comparison("inconclusive", 0.02, 0.05), smaller=True)
    assert not promoted and "margin" in reason


@pytest.mark.parametrize(
    ("value", "low", "doubted"),
    [(0.122, 0.0, True), (0.051, 0.05, True), (0.05, -0.1, False), (0.122, 0.06, False), (-0.2, -0.4, False)],
)
def test_a_gap_that_may_have_widened_bars_who_is_not_better(value: float, low: float, doubted: bool):
    from titanic_mlops.model.conditions import Gap, fairness_doubt

    rise = Estimate(value=value, low=low, high=0.284)
    doubt = fairness_doubt(
        [Gap(by="class", rate="selection rate", champion=0.2, challenger=0.3, rise=rise)], Policy()
    )
    assert bool(doubt) == doubted and (str(rise) in doubt) == doubted
    for verdict, promoted in (("better", True), ("inconclusive", not doubted)):
        found, reason = effect(Policy(), _comparison(verdict, 0.0, 0.01), newer=True, doubt=doubt)
        assert found == promoted and (promoted or doubt in reason)


def _condition(passed: bool, overridable: bool = True) -> Condition:
    return Condition(name="steady", observed="", needed="", passed=passed, why="", overridable=overridable)


def test_override_needs_a_name_and_a_reason_and_is_recorded():
    who = Override(by="E. Smith", reason="a licence ends on Sunday")
    overruled = decide([_condition(False)], None, override=who)
    assert overruled.promote and overruled.override == who and overruled.outcome == "stopped"
    assert "E. Smith" in overruled.reason and "steady" in overruled.reason
    assert "Promoted by override" in overruled._repr_markdown_()
    assert Decision.model_validate_json(overruled.model_dump_json()) == overruled
    for wrong in ({"by": "", "reason": "a licence ends on Sunday"}, {"by": "E. Smith", "reason": "why"}):
        with pytest.raises(ValidationError):
            Override(**wrong)


def test_override_does_not_reach_a_forged_bundle_and_is_not_used_up_in_vain():
    who = Override(by="E. Smith", reason="a licence ends on Sunday")
    assert not decide([_condition(False, overridable=False)], None, override=who).promote
    assert decide([_condition(True)], None, override=who).override is None


# --- single conditions


def test_nan_never_agrees():
    p = np.array([0.1, np.nan, 0.3])
    assert not agreement_condition("twin", p, p, 1e-5, "").passed
    assert agreement_condition("twin", p[:1], p[:1] + 5e-6, 1e-5, "").passed
    assert not agreement_condition("twin", p[:1], p[:1] + 5e-5, 1e-5, "").passed


@pytest.mark.parametrize("version", ["", "1", "abc", "1.x", "-1.0.0", "99.0.0"])
def test_unreadable_or_foreign_contract_is_refused(version: str):
    assert not contract_condition(version, "1.0.0").passed


def test_slope_finds_the_factor():
    random = np.random.default_rng(4)
    z = random.normal(0, 1.5, 6000)
    y = (random.uniform(size=6000) < 1 / (1 + np.exp(-z))).astype(int)
    for factor in (0.5, 1, 2):
        slope = calibration_slope(y, 1 / (1 + np.exp(-factor * z)), np.arange(6000) // 2)
        assert slope.low < 1 / factor < slope.high
        assert slope_condition(slope, Policy()).passed == (factor == 1)
    assert calibration_slope(y, np.full(6000, 0.4), np.arange(6000)).value == 0


@pytest.fixture(scope="module")
def passengers():
    from titanic_mlops.data.sources import canonical, read

    return canonical(read("embedded", outcome=True).frame)


def test_fairness_counts_what_it_says(passengers):
    y = passengers["survived"].to_numpy(int) == 1
    perfect, unjust = y, y & ~((passengers["sex"] == "female") & (passengers["pclass"] == 3)).to_numpy(bool)
    gaps = {(g.by, g.rate): g for g in fairness_gaps(passengers, unjust, perfect, draws=200)}
    assert (
        gaps["sex", "true positive rate"].champion == 0 and gaps["sex", "false positive rate"].challenger == 0
    )
    women = passengers["sex"] == "female"
    rate = (women & (passengers["pclass"] < 3))[y].sum() / women[y].sum()
    assert gaps["sex", "true positive rate"].challenger == pytest.approx(1 - rate)
    assert not fairness_condition(list(gaps.values()), Policy()).passed
    assert fairness_condition(fairness_gaps(passengers, perfect, perfect, draws=50), Policy()).passed


def test_few_passengers_are_no_finding(passengers):
    few = passengers.head(12)
    p = np.full(12, 0.99)
    condition = slice_condition(few, p, Policy(), champion=np.full(12, 0.5))
    assert condition.passed and "large enough" in condition.observed


def test_the_canary_needs_no_rows_to_keep_calm(passengers):
    few = passengers[passengers["survived"] == 0].head(30)
    leak, met = leak_conditions(few, np.arange(30) < 6)
    assert leak.passed and met.passed


def test_steady_counts_people():
    one, other = np.zeros(10, bool), np.arange(10) < 3
    assert not stability_condition(one, other, Policy(changed=0.2)).passed
    assert stability_condition(one, other, Policy(changed=0.3)).passed


def test_data_have_the_age_of_their_first_registration():
    assert data_age("a", "b", ["a", "b"]) == "older" and not age_condition("older").passed
    assert data_age("b", "b", ["a", "b"]) == "same"


@pytest.mark.parametrize("history", [["a", "b"], ["a", "b", "c"]])  # registered or not: that is no proof
@pytest.mark.parametrize(
    ("learnt", "before", "age"),
    [
        (["Ann", "Ben", "Ben", "Eve"], ["Ann", "Ben", "Ben"], "newer"),
        (["Ann", "Ben", "Eve"], ["Ann", "Ben", "Ben"], "other"),  # one of the two is gone
        (["Ann"], ["Ann", "Ben"], "other"),
        (["Ben", "Ann"], ["Ann", "Ben"], "other"),  # nobody is new
        (["Ann", "Ben"], [], "other"),  # a champion without a background does not say
    ],
)
def test_newer_data_hold_everybody_and_more(
    history: list[str], learnt: list[str], before: list[str], age: str
):
    assert data_age("c", "b", history, learnt, before) == age and age_condition(age).passed


def test_rows_with_new_outcomes_are_newer(passengers):
    "What the watcher retrains on: the champion's rows, and those whose outcome has come since."
    from titanic_mlops.model.train import holdout_mask
    from titanic_mlops.watch.incident import joined_rows

    records = passengers.head(40).assign(ticket=[f"record {n}" for n in range(40)])
    rows = joined_rows(passengers, records.astype(passengers.dtypes.to_dict())).frame
    names = [frame["name"][~holdout_mask(frame["ticket"])] for frame in (rows, passengers)]
    assert data_age("tonight", "b", ["a", "b"], *names) == "newer"
    assert data_age("tonight", "b", ["a", "b"], names[1], names[0]) == "other"


def test_too_good_is_measured_in_standard_errors():
    folds = Estimate(value=0.43, low=0.39, high=0.47)
    near, far = (Estimate(value=v, low=v - 0.06, high=v + 0.06) for v in (0.40, 0.20))
    assert too_good_condition(near, folds, Policy()).passed
    assert not too_good_condition(far, folds, Policy()).passed


def test_a_champion_that_does_not_say_whom_it_knows_settles_nothing():
    unknown = population_condition({}, Policy())
    assert not unknown.passed and unknown.overridable


def test_a_weight_that_is_no_number_is_found_wherever_it_hides():
    import onnx
    from onnx.helper import make_graph, make_model, make_node, make_tensor

    bad = make_tensor("v", onnx.TensorProto.FLOAT, [2], [1.0, float("nan")])
    ways = {
        "a constant": (make_node("Constant", [], ["y"], value=bad), []),
        "one number": (make_node("LeakyRelu", ["x"], ["y"], alpha=float("inf")), []),
        "a list": (make_node("Constant", [], ["y"], value_floats=[0.0, float("nan")]), []),
        "an initializer": (make_node("Add", ["x", "v"], ["y"]), [bad]),
    }
    for way, (node, initializers) in ways.items():
        graph = make_graph([node], "g", [], [], initializers)
        assert bad_weights(make_model(graph).SerializeToString()) == 1, way


def test_a_lost_feature_is_another_population(passengers):
    from titanic_mlops.data.features import feature_frame
    from titanic_mlops.model.bundle import reference_distributions

    X = feature_frame(passengers)
    own = population_distances(reference_distributions(X), X)
    assert max(own.values()) <= 0.11  # deciles are rounded to a tenth
    assert population_distances(reference_distributions(X), X.drop(columns="age"))["age"] == 1


# --- the attack


@pytest.mark.parametrize(
    ("rate", "wrong", "trials"),
    [("ties", 29, 400), ("run", 5, 40), ("honest", 21, 400), ("falsely", 400, 400), ("", 20, 400)],
)
def test_a_promise_is_broken_by_its_rate(rate: str, wrong: int, trials: int):
    from titanic_mlops.model.selftest import Alarms, Rate, SelfTest

    kept = Rate.of(20, 400)  # 5 %, as promised
    rates = dict.fromkeys(["ties", "honest", "run", "falsely"], kept)
    rates |= dict.fromkeys(["ties_better", "ties_worse", "bootstrap", "stopped", "run_all"], Rate.of(9, 9))
    found = Alarms(
        **rates | ({rate: Rate.of(wrong, trials)} if rate else {}), promised=0.05, effective=9, tickets=9
    )
    said = SelfTest(policy="1", outcomes=[], alarms=found)
    assert found.ok == said.ok == (not rate)


@pytest.mark.long
def test_selftest_catches_every_saboteur(fresh: Checkout, tmp_path: Path):
    page = tmp_path / "selftest.json"
    done = fresh.titanic("gate", "selftest", "--trials", "200", "--json", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(page.read_text())
    ends = said["outcomes"]
    assert sum(o["saboteur"] for o in ends) >= 25 and len(ends) >= 30
    assert all(o["ok"] for o in ends)
    assert all(o["expected_by"] in o["caught_by"] for o in ends if o["saboteur"])
    assert said["alarms"]["ties"]["trials"] == 200
    assert f"{len(ends)} of {len(ends)} cases as expected" in done.stdout


@pytest.mark.long
def test_a_loosened_policy_lets_somebody_through_and_selftest_says_so(tmp_path: Path):
    from titanic_mlops.model.selftest import CASES, self_test

    loose = Policy(slope_high=99.0, log_loss_high=9.0, ece=1.0, slice_loss=9.0, worse="promote")
    chosen = [case for case in CASES if case.name in ("flattened", "manifest lost")]
    found = self_test(tmp_path, loose, trials=0, cases=chosen)
    assert not found.ok
    assert {o.case: o.ok for o in found.outcomes} == {"flattened": False, "manifest lost": True}
    assert found.catches()["small"] == (0, 0)  # it had no occasion, and the page says so
    assert any("caught nothing" in line for line in _condition_lines(found))


@pytest.mark.long
def test_a_champion_that_can_not_answer_is_a_coin(tmp_path: Path):
    from dataclasses import replace

    from titanic_mlops.model.conditions import examine
    from titanic_mlops.model.selftest import Arena, Attempt, prepare
    from titanic_mlops.model.train import Candidate

    arena = Arena(tmp_path)
    entry = prepare(Attempt(candidate=Candidate("logistic", {"C": 0.2})), arena, tmp_path / "challenger")
    champion = arena.champion("standing")
    mute = replace(champion, p=np.full(len(champion.p), np.nan))
    decision = examine(entry.contender, mute, entry.evidence, Policy(fairness=1.0, changed=1.0))
    assert decision.outcome == "better" and decision.promote
    assert Decision.model_validate_json(decision.model_dump_json()) == decision
