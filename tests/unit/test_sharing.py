"""Energy sharing: published worked examples, each within its tolerance, and what must hold of any slot."""

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.sharing.models import MODELS, Key, Pots, Shared, Slot, as_the_operator, share, violations
from metering.sharing.rounding import half_up, largest_remainder, with_carry
from schemas.closed_lists import SharingModel, SharingSide
from schemas.errors import ContractBroken

M = SharingModel


def keys(**of_member: str) -> tuple[Key, ...]:
    return tuple(Key(member, Fraction(key)) for member, key in of_member.items())


def numbered(values: Sequence[float], first: int = 1) -> dict[str, int]:
    """kWh of P1, P2, … in Wh."""
    return {f"P{n}": round(value * 1000) for n, value in enumerate(values, first)}


FLANDERS_KEYS = keys(P1="0", P2="0.10", P3="0.225", P4="0.225", P5="0.225", P6="0.225")
FLANDERS = {
    "12:00": ([70, 10, 20], [30, 22, 30, 18, 20]),
    "12:15": ([20, 10, 30], [20, 20, 25, 17, 22]),
    "12:30": ([100, 10, 40], [10, 30, 35, 19, 24]),
    "12:45": ([0, 10, 50], [0, 40, 10, 25, 26]),
}
"""Injection of P1 to P3 and offtake of P2 to P6, kWh."""
FLANDERS_CELLS: list[tuple[SharingModel, str, list[float], list[float]]] = [
    (M.FLANDERS_FIXED, "12:00", [9, 18, 22.5, 18, 20], [4.9, 1.7, 5.9]),
    (M.FLANDERS_FIXED, "12:15", [5, 6.75, 13.5, 13.5, 13.5], [0, 1, 6.75]),
    (M.FLANDERS_FIXED, "12:30", [10, 24.75, 33.75, 19, 24], [19, 2.9, 16.6]),
    (M.FLANDERS_FIXED, "12:45", [0, 2.25, 10, 13.5, 13.5], [0, 2.416667, 18.333333]),
    (M.FLANDERS_RELATIVE, "12:00", [9.580645, 18.25, 24.056452, 18, 20], [7.079032, 1.011290, 2.022581]),
    (M.FLANDERS_RELATIVE, "12:15", [5.870968, 7, 15.709677, 15.709677, 15.709677], [0, 0, 0]),
    (M.FLANDERS_RELATIVE, "12:30", [10, 25, 35, 19, 24], [24.666667, 2.466667, 9.866667]),
    (M.FLANDERS_RELATIVE, "12:45", [0, 2.5, 10, 17.016129, 17.016129], [0, 2.244624, 11.223118]),
    (M.FLANDERS_OPTIMAL, "12:00", [11.490074, 21.651613, 28.858313, 18, 20], [0, 0, 0]),
    (M.FLANDERS_OPTIMAL, "12:15", [5.870968, 7, 15.709677, 15.709677, 15.709677], [0, 0, 0]),
    (M.FLANDERS_OPTIMAL, "12:30", [10, 30, 35, 19, 24], [14.755556, 1.475556, 15.768889]),
    (M.FLANDERS_OPTIMAL, "12:45", [0, 3.248208, 10, 23.375896, 23.375896], [0, 0, 0]),
]
"""Shared to P2 to P6, net injection of P1 to P3, kWh (Fluvius protocol 3.1)."""


def flanders(at: str) -> Slot:
    injection, offtake = FLANDERS[at]
    return Slot({"P1": 0} | numbered(offtake, 2), numbered(injection), FLANDERS_KEYS)


@pytest.mark.parametrize(("model", "at", "shared", "net"), FLANDERS_CELLS)
def test_flanders_shares_as_its_protocol_does(
    model: SharingModel, at: str, shared: list[float], net: list[float]
) -> None:
    slot = flanders(at)
    found = share(model, slot)
    for member, wh in numbered(shared, 2).items():
        assert abs(found.covered[member] - wh) <= 1
        assert abs(float(found.exact.covered[member]) - wh) < 0.6
    for producer, wh in numbered(net).items():
        assert abs(slot.surplus[producer] - found.sold[producer] - wh) <= 1
    assert sum(found.covered.values()) == sum(found.sold.values())
    assert not [pair for pair in found.sources if pair[0] == pair[1]]


def test_sellers_in_flanders_are_not_credited_pro_rata() -> None:
    found = share(M.FLANDERS_OPTIMAL, flanders("12:30"))
    assert (100_000 - found.sold["P1"], 40_000 - found.sold["P3"]) == pytest.approx((14_756, 15_769), abs=1)


def test_what_returns_to_all_may_leave_a_part_that_only_the_own_injection_can_give() -> None:
    """Two injectors, one of them the only one that takes: half of what the other left returns to it."""
    slot = Slot({"a": 1000, "b": 0}, {"a": 100, "b": 100}, keys(a="0.5", b="0.5"))
    found = share(M.FLANDERS_RELATIVE, slot)
    assert found.covered == {"a": 100, "b": 0}
    assert found.sold == {"a": 50, "b": 50}
    assert found.sources == {("a", "a"): 50, ("a", "b"): 50}
    alone = share(M.FLANDERS_OPTIMAL, Slot({"a": 1000}, {"a": 100}, keys(a="1")))
    assert (alone.covered, alone.sold) == ({"a": 0}, {"a": 0})


def test_no_injector_gets_more_back_than_it_gave() -> None:
    """b keeps its own, since nobody else has a key: what b does not take of a's returns to a alone."""
    found = share(M.FLANDERS_RELATIVE, Slot({"b": 20}, {"a": 100, "b": 100}, keys(b="1")))
    assert (found.covered, found.sold) == ({"b": 20}, {"a": 20, "b": 0})


AUSTRIA_SURPLUS = ([0, 14, 35, 86, 136, 1], [795, 13])
AUSTRIA_SHORTAGE = ([0, 37, 36, 129, 145, 236], [386, 0])


def in_mwh(values: dict[str, int]) -> dict[str, int]:
    return {name: wh * 1000 for name, wh in values.items()}


def test_austria_as_its_operators_compute_it() -> None:
    taken, given_ = (dict(zip("abcdef", values, strict=False)) for values in AUSTRIA_SURPLUS)
    found = as_the_operator(in_mwh(taken), in_mwh(given_))
    assert list(found.share.values()) == [0, 41_588, 103_971, 255_471, 404_000, 2_971]
    assert sum(found.share.values()) == 808_001
    assert found.covered == in_mwh(taken)
    assert list(found.feed_in.values()) == [527_376, 8_624]
    taken, given_ = (dict(zip("abcdef", values, strict=False)) for values in AUSTRIA_SHORTAGE)
    found = as_the_operator(in_mwh(taken), in_mwh(given_))
    assert list(found.share.values()) == [0, 24_497, 23_835, 85_410, 96_003, 156_254]
    assert (sum(found.share.values()), found.covered) == (385_999, found.share)
    assert list(found.feed_in.values()) == [1, 0], "a mWh that rounding one by one invents"
    assert as_the_operator({"a": 0}, {"b": 0}) == ({"a": 0}, {"a": 0}, {"b": 0})


@pytest.mark.parametrize("row", [AUSTRIA_SURPLUS, AUSTRIA_SHORTAGE])
def test_austria_in_whole_wh_is_within_one_of_it(row: tuple[list[int], list[int]]) -> None:
    taken, given_ = (dict(zip("abcdef", values, strict=False)) for values in row)
    ours, theirs = share(M.AUSTRIA_DYNAMIC, Slot(taken, given_)), as_the_operator(in_mwh(taken), in_mwh(given_))
    for member, wh in ours.covered.items():
        assert abs(wh * 1000 - theirs.covered[member]) <= 1000
        assert abs(ours.ideal[member] * 1000 - theirs.share[member]) <= 1000
    for producer, wh in ours.sold.items():
        assert abs((given_[producer] - wh) * 1000 - theirs.feed_in[producer]) <= 1000
    assert sum(ours.covered.values()) == min(sum(taken.values()), sum(given_.values()))


GERMANY = [  # E1, V2, V3, then draw 2, draw 3, feed-in of static, draw 2, feed-in of cascade, draws of proportional
    (100, 5, 50, (0, 0, 45), (0, 45), (0, 0)),
    (100, 20, 95, (10, 5, 0), (10, 0), (2.6087, 12.3914)),
    (100, 5, 95, (0, 5, 5), (0, 5), (0, 0)),
    (0, 10, 10, (10, 10, 0), (10, 0), (10, 10)),
    (100, 0, 0, (0, 0, 100), (0, 100), (0, 0)),
    (40, 30, 0, (26, 0, 36), (0, 10), (0, 0)),
    (12.345, 1, 20, (0, 8.8895, 0.2345), (0, 0.2345), (0.412143445, 8.2428689)),
]
STATIC_KEYS = (Key("t2", Fraction("0.1"), tier=2), Key("t3", Fraction("0.9"), tier=1))
"""In the cascade tenant 2 gets what tenant 3 leaves, too."""


@pytest.mark.parametrize(("e1", "v2", "v3", "static", "cascade", "proportional"), GERMANY)
def test_germany_shares_as_the_formulas_for_buildings_do(
    e1: float,
    v2: float,
    v3: float,
    static: tuple[float, ...],
    cascade: tuple[float, ...],
    proportional: tuple[float, ...],
) -> None:
    slot = Slot({"t2": round(v2 * 1000), "t3": round(v3 * 1000)}, {"e1": round(e1 * 1000)}, STATIC_KEYS)

    def drawn(found: Shared) -> list[Fraction]:
        """Exact draws of both and the feed-in, kWh; the whole ones are within 1 Wh."""
        draws = [slot.consumption[i] - wh for i, wh in found.exact.covered.items()]
        feed_in = slot.surplus["e1"] - found.exact.sold["e1"]
        for i, draw in zip(("t2", "t3"), draws, strict=True):
            assert abs(slot.consumption[i] - found.covered[i] - draw) < 1
        assert abs(slot.surplus["e1"] - found.sold["e1"] - feed_in) < 1
        return [each / 1000 for each in (*draws, feed_in)]

    assert drawn(share(M.GERMANY_STATIC, slot)) == [Fraction(str(each)) for each in static]
    at2, at3, feed_in = drawn(share(M.GERMANY_CASCADE, slot))
    assert (at2, at3, feed_in) == (Fraction(str(cascade[0])), Fraction(str(static[1])), Fraction(str(cascade[1])))
    assert drawn(share(M.GERMANY_PROPORTIONAL, slot))[:2] == [Fraction(str(each)) for each in proportional]


def test_germany_shares_no_more_than_is_taken() -> None:
    found = share(M.GERMANY_PROPORTIONAL, Slot({"a": 1, "b": 3}, {"p": 10}))
    assert (sum(found.covered.values()), 10 - found.sold["p"]) == (4, 6)


def test_wallonia_by_keys() -> None:
    members = keys(a="0.3", b="0.5", c="0.2")
    found = share(M.WALLONIA_ROUNDS, Slot({"a": 160, "b": 300, "c": 350}, {"p": 1000}, members))
    assert found.covered == {"a": 160, "b": 300, "c": 200}
    assert (1000 - found.sold["p"], 350 - found.covered["c"]) == (340, 150)
    assert found.ideal == {"a": 300, "b": 500, "c": 200}


def test_wallonia_pro_rata() -> None:
    found = share(M.WALLONIA_ROUNDS, Slot({"a": 200, "b": 300}, {"p": 1000}, (Key("a"), Key("b"))))
    assert found.ideal == {"a": 400, "b": 600}
    assert sum(found.covered.values()) == 500


def test_wallonia_in_two_rounds() -> None:
    half = [Key(None, Fraction(1, 2), round=n) for n in (1, 2)]
    found = share(M.WALLONIA_ROUNDS, Slot({"a": 100}, {"p": 1000}, (*half, Key("a"), Key("a", round=2))))
    assert found.exact.offers == [{"a": 500}, {"a": 900}]
    assert found.covered == {"a": 100}


@pytest.mark.parametrize("model", [M.BRUSSELS_STATIC, M.BRUSSELS_ROUNDS])
def test_brussels_in_one_round_and_in_several(model: SharingModel) -> None:
    quarters = keys(a="0.25", b="0.25", c="0.25", d="0.25")
    found = share(model, Slot({"a": 10, "b": 500, "c": 20, "d": 500}, {"p": 400}, quarters))
    several = model is M.BRUSSELS_ROUNDS
    assert found.covered == {"a": 10, "b": 185 if several else 100, "c": 20, "d": 185 if several else 100}
    assert set(found.ideal.values()) == {100}


def test_france_in_order_of_priority() -> None:
    found = share(M.PRIORITY, Slot({"b": 400, "c": 800}, {"a": 1000}, (Key("b", tier=1), Key("c", tier=2))))
    assert found.covered == {"b": 400, "c": 600}
    assert 800 - found.covered["c"] == 200


def test_france_by_pairs_leaves_what_is_not_taken_with_its_producer() -> None:
    pairs = (
        Key("a", Fraction(1, 2), "p"), Key("b", Fraction(1, 2), "p"), Key("b", Fraction(1), "q"),
    )  # fmt: skip
    found = share(M.FRANCE_PAIR, Slot({"a": 20, "b": 90}, {"p": 100, "q": 100}, pairs))
    assert found.covered == {"a": 20, "b": 90}
    assert found.sources == {("a", "p"): 20, ("b", "p"): 30, ("b", "q"): 60}
    assert found.ideal == {"a": 50, "b": 150}


def test_france_by_default_and_by_keys() -> None:
    slot = Slot({"a": 100, "b": 300}, {"p": 200}, keys(a="0.5", b="0.5"))
    assert share(M.FRANCE_DYNAMIC, slot).covered == {"a": 50, "b": 150}
    assert share(M.FRANCE_STATIC, slot).covered == {"a": 100, "b": 100}


def test_luxembourg_lets_the_side_share_that_wants_more() -> None:
    points = (
        Key("a", Fraction("0.9"), tier=1), Key("b", Fraction("0.1"), tier=2),
        Key(None, Fraction("0.2"), "p", tier=2), Key(None, Fraction("0.8"), "q", tier=1),
    )  # fmt: skip
    sides = (SharingSide.PRIORITY, SharingSide.PERCENTAGE)
    short = Slot({"a": 80, "b": 120}, {"p": 50, "q": 50}, points, sides)
    assert share(M.LUXEMBOURG, short)[1:3] == ({"a": 80, "b": 20}, {"p": 50, "q": 50})
    plenty = Slot({"a": 40, "b": 60}, {"p": 90, "q": 110}, points, sides)
    assert share(M.LUXEMBOURG, plenty)[1:3] == ({"a": 40, "b": 60}, {"p": 20, "q": 80})
    first = Slot({"a": 40, "b": 100}, {"p": 90, "q": 110}, points, (SharingSide.PRO_RATA, SharingSide.PRIORITY))
    assert share(M.LUXEMBOURG, first)[1:3] == ({"a": 40, "b": 100}, {"p": 30, "q": 110})
    default = Slot({"a": 80, "b": 120}, {"p": 50, "q": 50})
    assert share(M.LUXEMBOURG, default).covered == {"a": 40, "b": 60}


def test_spain_by_the_key_of_the_hour() -> None:
    found = share(M.SPAIN_HOURLY, Slot({"a": 1000, "b": 100}, {"p": 1000}, keys(a="0.6", b="0.4")))
    assert (found.covered, found.ideal) == ({"a": 600, "b": 100}, {"a": 600, "b": 400})
    assert MODELS[M.SPAIN_HOURLY].slot_s == 3600


def test_spain_whole_kwh_with_carry_over_time() -> None:
    """500 kWh an hour on 8 shares, of which one has 62.5 kWh."""
    hours = with_carry([62_500] * 25, 1000)
    assert hours == [62, 63] * 12 + [62]
    assert 25 * 62_500 - sum(hours) * 1000 == 500
    assert with_carry([500] * 6, 1000) == [0, 1, 0, 1, 0, 1]


def test_portugal_in_tiers_pro_rata_within_one() -> None:
    tiers = (Key("a", tier=1), Key("b", tier=2), Key("c", tier=2), Key("d", tier=3))
    found = share(M.PORTUGAL_HIERARCHICAL, Slot({"a": 40, "b": 60, "c": 120, "d": 9}, {"p": 100}, tiers))
    assert found.covered == {"a": 40, "b": 20, "c": 40, "d": 0}
    assert share(M.PORTUGAL_PROPORTIONAL, Slot({"a": 30, "b": 10}, {"p": 20})).covered == {"a": 15, "b": 5}
    assert share(M.PORTUGAL_FIXED, Slot({"a": 30, "b": 10}, {"p": 20}, keys(a="0.5", b="0.5"))).covered["a"] == 10


def test_italy_counts_the_lesser_of_both_sums_of_an_hour() -> None:
    for taken, given_, least in ((700, 1000, 700), (1000, 700, 700)):
        found = share(M.ITALY_HOURLY, Slot({"a": taken - 100, "b": 100}, {"p": given_ - 1, "q": 1}))
        assert sum(found.covered.values()) == least
    assert MODELS[M.ITALY_HOURLY].slot_s == 3600


IDS = st.sampled_from([f"m{n}" for n in range(7)])
WH = st.integers(0, 5) | st.integers(0, 3_000_000)


@st.composite
def slots(draw: st.DrawFn) -> Slot:
    """Any slot: meters that take, inject or both, keys for all that a model may ask for."""
    consumption, surplus = draw(st.dictionaries(IDS, WH)), draw(st.dictionaries(IDS, WH, max_size=5))
    weights = draw(st.lists(st.integers(0, 9), min_size=14, max_size=14))
    members, producers = sorted(consumption), sorted(surplus)
    whole = max(sum(weights[: len(members)]), 1)
    found = [
        Key(i, Fraction(weight, whole), round=1 + weight % 2, tier=1 + weight % 3)
        for i, weight in zip(members, weights, strict=False)
    ]
    whole = max(sum(weights[7 : 7 + len(producers)]), 1)
    found += [
        Key(None, Fraction(weight, whole), j, tier=1 + weight % 2)
        for j, weight in zip(producers, weights[7:], strict=False)
    ]
    side = st.sampled_from(SharingSide)
    return Slot(consumption, surplus, tuple(found), (draw(side), draw(side)))


def by_pair(slot: Slot) -> Slot:
    """Each producer's surplus by keys of its own, some pairs without one."""
    members = [key for key in slot.keys if key.member_id is not None]
    found = [
        Key(key.member_id, key.key, j)
        for n, j in enumerate(sorted(slot.surplus))
        for m, key in enumerate(members)
        if (n + m) % 3
    ]
    return Slot(slot.consumption, slot.surplus, tuple(found))


@pytest.mark.parametrize("model", SharingModel)
@settings(deadline=None)
@given(slot=slots(), seed=st.integers(0, 99))
def test_the_invariants_hold_of_any_slot_in_any_order(model: SharingModel, slot: Slot, seed: int) -> None:
    if MODELS[model].pots is Pots.PAIRS:
        slot = by_pair(slot)
    found = share(model, slot)
    assert violations(MODELS[model], slot, found) == []
    for member, wh in found.covered.items():
        assert 0 <= wh <= slot.consumption[member]
        assert abs(wh - found.exact.covered[member]) < (2 if MODELS[model].pots is Pots.PAIRS else 1)
    assert sum(found.covered.values()) == sum(found.sold.values()) <= sum(slot.surplus.values())

    def mixed(values: Mapping[str, int]) -> dict[str, int]:
        return dict(random.Random(seed).sample(sorted(values.items()), len(values)))

    shuffled = random.Random(seed).sample(slot.keys, len(slot.keys))
    again = Slot(mixed(slot.consumption), mixed(slot.surplus), tuple(shuffled), slot.sides)
    assert share(model, again)[:4] == found[:4]


def test_a_broken_invariant_is_never_silent() -> None:
    slot = Slot({"a": 10}, {"p": 10})
    found = share(M.AUSTRIA_DYNAMIC, slot)
    wrong = found._replace(covered={"a": 11})
    assert len(violations(MODELS[M.AUSTRIA_DYNAMIC], slot, wrong)) == 6
    with pytest.raises(ContractBroken, match="austria_static: .*a member gets less than 0 or more than it took"):
        share(M.AUSTRIA_STATIC, Slot({"a": 10}, {"p": 10}, keys(a="-1")))
    with pytest.raises(ContractBroken, match="energy below 0"):
        share(M.AUSTRIA_DYNAMIC, Slot({"a": -1}, {"p": 10}))


def test_rounding_keeps_the_sum_and_ties_go_by_id() -> None:
    third = Fraction(1, 3)
    assert largest_remainder({"c": third, "a": third, "b": third}) == {"a": 1, "b": 0, "c": 0}
    assert largest_remainder({"a": Fraction(1, 2), "b": Fraction(2, 5)}) == {"a": 0, "b": 0}
    assert [half_up(Fraction(n, 2)) for n in (1, 2, 3)] == [1, 1, 2]
