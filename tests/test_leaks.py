"""Each kind of leak is put into the real passengers, and the canary has to name it; honest tables have to pass."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from checkout import QUICK, Checkout

from titanic_mlops.data.contract import columns
from titanic_mlops.data.features import CATEGORICAL, NUMERIC, feature_frame
from titanic_mlops.data.leaks import (
    INTERACTIONS,
    people,
    refuse_peeking,
    refuse_revealing,
    refuse_shared,
    traces,
)
from titanic_mlops.data.sources import EMBEDDED, canonical, read
from titanic_mlops.ground.errors import LeakError
from titanic_mlops.model.train import Candidate, fit_on, holdout_mask, ticket_folds

SEEN = [*NUMERIC, *CATEGORICAL]


@pytest.fixture(scope="module")
def passengers() -> pd.DataFrame:
    return canonical(read(EMBEDDED).frame)


def revealing(table: pd.DataFrame, interactions: tuple = ()) -> list:
    "The canary on columns or features, with the outcome and the tickets of the passengers."
    own = canonical(read(EMBEDDED).frame)
    return refuse_revealing(table, own.survived.to_numpy(int), own.ticket.to_numpy(str), interactions)


# --- columns that know the outcome


def noisy(passengers: pd.DataFrame, wrong: float) -> np.ndarray:
    "The outcome, wrong for some."
    flip = np.random.default_rng(7).random(len(passengers)) < wrong
    return np.where(flip, 1 - passengers.survived, passengers.survived).astype(float)


LEAKS = {
    "lifeboats as cabins": ("cabin", lambda f: f.boat),
    "lifeboats as homes": ("home_dest", lambda f: f.boat),
    "bodies, missing for all others": ("home_dest", lambda f: f.body.astype("str")),
    "bodies as ages, 0 for none": ("age", lambda f: f.body.fillna(0).astype(float)),
    "a port that is missing for the dead": ("embarked", lambda f: f.embarked.where(f.survived == 1)),
    "a port that is missing for the living": ("embarked", lambda f: f.embarked.where(f.survived == 0)),
    "the outcome as a fare, in pounds": ("fare", lambda f: f.survived.astype(float) * 30 + 5),
    "the outcome as an age, upside down": ("age", lambda f: 40.0 - f.survived.astype(float)),
    "the outcome with 5 % mistakes": ("fare", lambda f: noisy(f, 0.05)),
    "the outcome in the length of a text": ("cabin", lambda f: [f"{i}{'x' * int(s)}".rjust(6 + int(s), "c") for i, s in enumerate(f.survived)]),
    "the outcome in the first word of a text": ("home_dest", lambda f: [f"{'saved' if s else 'lost'} near {i}" for i, s in enumerate(f.survived)]),
    "neither high nor low, but in the middle": ("age", lambda f: np.where(f.survived == 1, 30.0, np.where(f.index % 2, 10.0, 60.0)) + f.index % 7),
    "a mark on a tenth, all of whom lived": ("home_dest", lambda f: pd.Series("London", f.index).mask((f.survived == 1) & (f.index % 4 == 0), "New York")),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_a_column_that_knows_the_outcome_is_refused_under_any_name(passengers, name: str):
    column, leak = LEAKS[name]
    with pytest.raises(LeakError) as raised:
        revealing(passengers.assign(**{column: leak(passengers)}))
    assert f"column {column}" in raised.value.where
    assert "ROC-AUC" in raised.value.what or "same outcome" in raised.value.what, raised.value.what


def test_a_feature_that_knows_the_outcome_is_refused(passengers):
    X = feature_frame(passengers.assign(cabin="C" + passengers.boat))  # a deck for those who had a boat
    with pytest.raises(LeakError, match="deck reveals the outcome"):
        revealing(X[[*SEEN, "deck"]], interactions=INTERACTIONS)


def test_a_title_that_was_given_to_the_dead_is_refused(passengers):
    dead, random = np.flatnonzero(passengers.survived == 0), np.random.default_rng(0)
    late = passengers.index.isin(random.choice(dead, len(dead) // 2, replace=False))
    names = passengers.name.mask(late, passengers.name.str.replace(r", [^.]*\.", ", Late.", regex=True))
    with pytest.raises(LeakError, match="title reveals the outcome"):
        revealing(feature_frame(passengers.assign(name=names))[SEEN], interactions=INTERACTIONS)


@pytest.mark.parametrize(
    "alphabet",
    [
        "абцдефгхийклмнопярстувшхыз",
        "αβψδεφγηιξκλμνοπθρστυβωχψζ",
        "あいうえおかきくけこさしすせそたちつてとなにぬねのは",
    ],
)
def test_people_whose_names_are_in_another_alphabet_are_not_one_person(passengers, alphabet: str):
    letters = str.maketrans("abcdefghijklmnopqrstuvwxyz", alphabet)
    family = passengers.name.str.partition(",")
    there = passengers.assign(name=family[0].str.lower().str.translate(letters) + family[1] + family[2])
    assert len(set(people(there))) == len(passengers)


def test_a_double_is_found_whatever_its_accents(passengers):
    accents = str.maketrans("eoa", "éöä")
    twice = passengers.head(40).assign(name=passengers.head(40).name.str.translate(accents), ticket="new")
    both = pd.concat([passengers, twice], ignore_index=True)
    assert (people(both)[len(passengers) :] == np.arange(40)).all()


def test_declared_columns_may_know_it_and_honest_ones_pass_with_a_margin(passengers):
    found = revealing(passengers) + revealing(feature_frame(passengers)[SEEN], interactions=INTERACTIONS)
    declared = {c.name for c in columns() if c.role in ("outcome", "reveals_outcome")}
    assert not declared & {one.column for one in found}
    assert max(one.auc for one in found) < 0.85 and max(one.certain for one in found) < 0.90
    sex = next(one for one in found if one.column == "sex")
    assert 0.70 < sex.auc < 0.80


def test_honest_tables_of_other_sizes_raise_no_alarm(passengers):
    y, random = passengers.survived.to_numpy(int), np.random.default_rng(3)
    tickets = passengers.ticket.unique()
    for share in [0.2] * 10 + [0.5] * 10 + [0.9] * 10:
        rows = passengers.ticket.isin(
            random.choice(tickets, int(share * len(tickets)), replace=False)
        ).to_numpy()
        part = passengers[rows].reset_index(drop=True)
        table = part.drop(columns=["survived", "boat", "body"])
        assert not [one.evidence for one in traces(table, y[rows], part.ticket.to_numpy(str)) if one.reveals]


def test_noise_and_identifiers_say_nothing(passengers):
    random = np.random.default_rng(1)
    table = pd.DataFrame(
        {
            "number": random.normal(size=len(passengers)),
            "identifier": [f"{i:05d}" for i in random.permutation(len(passengers))],
            "constant": "the same",
            "empty": None,
        }
    )
    assert all(one.auc < 0.6 for one in revealing(table))


# --- people on two sides


def test_a_split_that_tears_tickets_is_refused(passengers):
    torn = np.where(np.arange(len(passengers)) % 5 == 0, "hold-out", "training")
    with pytest.raises(LeakError, match="tickets on two sides") as raised:
        refuse_shared(passengers, torn)
    assert "(training)" in raised.value.where and "(hold-out)" in raised.value.where


def test_one_torn_ticket_among_hundreds_is_enough(passengers):
    side = holdout_mask(passengers.ticket)
    family = np.flatnonzero(passengers.ticket == passengers.ticket[passengers.ticket.duplicated()].iloc[0])
    side[family[0]] = ~side[family[0]]
    with pytest.raises(LeakError, match=str(passengers.ticket[family[0]])):
        refuse_shared(passengers, side)


@pytest.mark.parametrize(
    "change",
    [
        {"ticket": "another"},
        {"ticket": "another", "fare": 1.0, "cabin": "Z 9"},
        {"ticket": "another", "name": lambda f: f.name.str.upper()},
        {"ticket": "another", "name": lambda f: f.name.str.replace("o", "a", n=1)},
        {"ticket": "another", "age": lambda f: f.age + 0.5},
        {"ticket": "another", "age": float("nan")},
    ],
)
def test_a_passenger_on_two_sides_is_refused(passengers, change: dict):
    twice = pd.concat([passengers, passengers.iloc[[200]].assign(**change)], ignore_index=True)
    side = np.where(twice.index == len(passengers), "hold-out", "training")
    with pytest.raises(LeakError, match="1 passenger on two sides") as raised:
        refuse_shared(twice, side)
    assert passengers.name[200] in raised.value.where


def test_a_passenger_of_whom_neither_age_nor_fare_is_known_is_refused_on_two_sides(passengers):
    bare = passengers.assign(
        **{name: passengers[name].where(passengers.index != 200) for name in ("age", "fare")}
    )
    twice = pd.concat([bare, bare.iloc[[200]].assign(ticket="another")], ignore_index=True)
    with pytest.raises(LeakError, match="1 passenger on two sides"):
        refuse_shared(twice, np.where(twice.index == len(passengers), "hold-out", "training"))


def test_namesakes_are_two_people(passengers):
    assert len(set(people(passengers))) == len(passengers)
    fareless = passengers.assign(fare=float("nan"))  # some ages are not known either
    assert len(set(people(fareless))) == len(passengers)


def test_the_splits_that_are_used_are_clean(passengers):
    refuse_shared(passengers, holdout_mask(passengers.ticket))
    fold = np.empty(len(passengers), int)
    y, ticket = passengers.survived.to_numpy(int), passengers.ticket.to_numpy(str)
    for number, (_, out) in enumerate(ticket_folds(y, ticket, 5, seed=1)):
        fold[out] = number
    refuse_shared(passengers, fold)


# --- fits that see more than their rows


@pytest.fixture(scope="module")
def rows(passengers) -> np.ndarray:
    return np.flatnonzero(~holdout_mask(passengers.ticket))


PEEKS = {
    "age": lambda t: t.age.fillna(t.age.median()),  # a median of everybody
    "fare": lambda t: (t.fare - t.fare.mean()) / t.fare.std(),  # a scale of everybody
    "survived": lambda t: (
        t.survived.astype(float).groupby(t.ticket).transform("mean")
    ),  # companions' outcomes
    "embarked": lambda t: t.embarked.map(t.embarked.value_counts()),  # frequencies of everybody
    "sibsp": lambda t: t.sibsp.astype(float).rank(),  # ranks among everybody
}


@pytest.mark.parametrize("column", PEEKS)
def test_what_is_learnt_from_other_rows_is_refused(passengers, rows, column: str):
    # tickets are torn for this one: with whole tickets, companions are in the training rows themselves
    own = np.arange(0, len(passengers), 2) if column == "survived" else rows
    with pytest.raises(LeakError, match="outside its training rows") as raised:
        refuse_peeking(lambda t, r: PEEKS[column](t).fillna(0).to_numpy(float)[r], passengers, own)
    assert f"column {column}" in raised.value.where


@pytest.mark.parametrize(
    "candidate", [Candidate("logistic"), Candidate("boosting", {"max_iter": 5}, "sigmoid")], ids=["logistic", "boosting"]
)  # fmt: skip
def test_the_candidates_see_their_rows_only(passengers, rows, candidate: Candidate):
    outside = refuse_peeking(lambda t, r: fit_on(candidate, t, r), passengers, rows)
    assert outside == len(passengers) - len(rows)


def test_a_candidate_that_is_fitted_before_the_split_is_refused(passengers, rows):
    everybody = np.arange(len(passengers))
    with pytest.raises(LeakError, match="survived"):
        refuse_peeking(lambda t, r: fit_on(Candidate("logistic"), t, everybody)[r], passengers, rows)


# --- the whole way


@pytest.mark.long
def test_a_leak_in_the_source_stops_the_run(fresh: Checkout, passengers, tmp_path: Path):
    source = tmp_path / "filed.csv"
    passengers.assign(cabin=passengers.boat, boat=None).to_csv(source, index=False)
    done = fresh.titanic("run", f"source={source}", "model=logistic", *QUICK)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cabin reveals the outcome" in done.stderr and "ROC-AUC 0.9" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (fresh.store / "steps" / "train.logistic").exists()
