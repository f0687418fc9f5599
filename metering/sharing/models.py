"""Sharing models: the surplus of a slot over the members of a community, exact inside, whole Wh at the end.

One engine for all: a round offers a pot by weights, cuts each offer at what the member still needs, and returns what
was cut. A model says by what it weighs, who takes part in which round, and where the cut part goes (`MODELS`).

Sources: Fluvius protocol 3.1 (Flanders); EDA, the Austrian data exchange; BDEW's formulas to §42b EnWG (Germany); keys
by the CWaPE (Wallonia), Sibelga (Brussels), Enedis (France), ILR/E21/32 (Luxembourg), RD 244/2019 (Spain). Those of
Enedis, Creos, Sibelga and E-REDES were not opened: these models follow their public descriptions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from fractions import Fraction
from math import floor
from typing import NamedTuple

from metering.sharing.rounding import Cells, by_source, half_up, largest_remainder, sums
from schemas.closed_lists import SharingModel, SharingSide
from schemas.errors import ContractBroken

Exact = dict[str, Fraction]
QUOTIENT = 10**6
"""Germany's quotient of a member's consumption has six decimals, cut toward zero."""
QUARTER_S, HOUR_S = 900, 3600


class Weigh(Enum):
    """By what a round offers."""

    KEY = auto()
    CONSUMPTION = auto()
    QUOTIENT = auto()


class Rounds(Enum):
    """Who takes part in which round, and in which part of the surplus beside what the round before left.

    ONE: all, in the whole. REPEATED: those who still need, their keys renormalised, until nothing is shared. TIERS: a
    tier after the other, the first in the whole. CASCADE: a tier after the other, each in its keys' part. DECLARED: as
    the keys' rounds say, each in the part of the key without a member.
    """

    ONE = auto()
    REPEATED = auto()
    TIERS = auto()
    CASCADE = auto()
    DECLARED = auto()


class Pots(Enum):
    """Of what a round offers.

    POOL: all surplus as one; sellers are credited pro rata. INJECTORS: each injector's to the others, what was cut goes
    back to all pro rata of their injection. PAIRS: each producer's by keys of its own, what was cut stays with it.
    SIDES: one side is satisfied, the other shares by a model of its own.
    """

    POOL = auto()
    INJECTORS = auto()
    PAIRS = auto()
    SIDES = auto()


@dataclass(frozen=True)
class Model:
    """What a model is made of.

    Attributes:
        weigh: by what a round offers.
        rounds: who takes part when.
        pots: of what.
        renormalises: of injectors: the keys of the others are brought to 1, else an injector keeps its own key's part.
        uses_all: what is shared is the lesser of surplus and consumption: nothing is lost by keys.
        slot_s: length of a slot, s.
    """

    weigh: Weigh = Weigh.KEY
    rounds: Rounds = Rounds.ONE
    pots: Pots = Pots.POOL
    renormalises: bool = False
    uses_all: bool = False
    slot_s: int = QUARTER_S


STATIC = Model()
PRO_RATA = Model(weigh=Weigh.CONSUMPTION, uses_all=True)
TIERS = Model(weigh=Weigh.CONSUMPTION, rounds=Rounds.TIERS)
MODELS = {
    SharingModel.FLANDERS_FIXED: Model(pots=Pots.INJECTORS),
    SharingModel.FLANDERS_RELATIVE: Model(pots=Pots.INJECTORS, renormalises=True),
    SharingModel.FLANDERS_OPTIMAL: Model(pots=Pots.INJECTORS, renormalises=True, rounds=Rounds.REPEATED),
    SharingModel.AUSTRIA_STATIC: STATIC,
    SharingModel.AUSTRIA_DYNAMIC: PRO_RATA,
    SharingModel.GERMANY_STATIC: STATIC,
    SharingModel.GERMANY_CASCADE: Model(rounds=Rounds.CASCADE),
    SharingModel.GERMANY_PROPORTIONAL: Model(weigh=Weigh.QUOTIENT),
    SharingModel.WALLONIA_ROUNDS: Model(rounds=Rounds.DECLARED),
    SharingModel.BRUSSELS_STATIC: STATIC,
    SharingModel.BRUSSELS_ROUNDS: Model(rounds=Rounds.REPEATED),
    SharingModel.BRUSSELS_PRO_RATA: PRO_RATA,
    SharingModel.FRANCE_STATIC: STATIC,
    SharingModel.FRANCE_DYNAMIC: PRO_RATA,
    SharingModel.FRANCE_PAIR: Model(pots=Pots.PAIRS),
    SharingModel.LUXEMBOURG: Model(pots=Pots.SIDES),
    SharingModel.PRIORITY: TIERS,
    SharingModel.SPAIN_HOURLY: Model(slot_s=HOUR_S),
    SharingModel.PORTUGAL_FIXED: STATIC,
    SharingModel.PORTUGAL_PROPORTIONAL: PRO_RATA,
    SharingModel.PORTUGAL_HIERARCHICAL: TIERS,
    SharingModel.ITALY_HOURLY: Model(weigh=Weigh.CONSUMPTION, uses_all=True, slot_s=HOUR_S),
}
OF_SIDE = {SharingSide.PRO_RATA: PRO_RATA, SharingSide.PRIORITY: TIERS, SharingSide.PERCENTAGE: STATIC}


class Key(NamedTuple):
    """A part that was agreed on.

    Attributes:
        member_id: whose; None: of a round (its part of the surplus), or of a production point (`producer_id`).
        key: 0 to 1; None: pro rata of consumption, of what the round's other keys leave.
        producer_id: of whose surplus; None: of all.
        round: in which round.
        tier: in which tier, the least first.
    """

    member_id: str | None
    key: Fraction | None = None
    producer_id: str | None = None
    round: int = 1
    tier: int = 1


@dataclass(frozen=True)
class Slot:
    """A slot of a community.

    Attributes:
        consumption: Wh of each member.
        surplus: Wh of each producer.
        keys: see `Key`; a member without one takes nothing where the model goes by keys, tiers or rounds.
        sides: how consumption and production points share (Luxembourg).
    """

    consumption: Mapping[str, int]
    surplus: Mapping[str, int]
    keys: tuple[Key, ...] = ()
    sides: tuple[SharingSide, SharingSide] = (SharingSide.PRO_RATA, SharingSide.PRO_RATA)


@dataclass
class Exactly:
    """A slot shared, not rounded yet, Wh.

    Attributes:
        covered: of each member.
        sold: of each producer; the same sum.
        offers: of each round what was offered to whom, before the cut at consumption.
    """

    covered: Exact
    sold: Exact
    offers: list[Exact] = field(default_factory=list)


class Shared(NamedTuple):
    """A slot shared, Wh.

    Attributes:
        ideal: of each member what its first round offered, rounded down; may be above its consumption.
        covered: of each member what it gets, at most its consumption.
        sold: of each producer what it is credited; the same sum.
        sources: (member, producer) → what of `covered` is of this one; sums up to both.
        exact: before rounding.
    """

    ideal: dict[str, int]
    covered: dict[str, int]
    sold: dict[str, int]
    sources: Cells
    exact: Exactly


def share(name: SharingModel, slot: Slot) -> Shared:
    """Shares a slot by a model; the same whatever the order of what it is given.

    Raises:
        ContractBroken: an invariant of the model does not hold.
    """
    model = MODELS[name]
    ids, producers = sorted(slot.consumption), sorted(slot.surplus)
    if any(wh < 0 for wh in (*slot.consumption.values(), *slot.surplus.values())):
        msg = f"{name}: energy below 0"
        raise ContractBroken(msg)
    keys = tuple(sorted(slot.keys, key=lambda key: (key.round, key.tier, key.member_id or "", key.producer_id or "")))
    ordered = Slot({i: slot.consumption[i] for i in ids}, {j: slot.surplus[j] for j in producers}, keys, slot.sides)
    exact = SHARE[model.pots](model, ordered)
    covered, sold = largest_remainder(exact.covered), largest_remainder(exact.sold)
    pairs = {(key.member_id, key.producer_id) for key in keys}
    may: dict[Pots, Callable[[str, str], bool]] = {
        Pots.INJECTORS: lambda member, producer: member != producer,
        Pots.PAIRS: lambda member, producer: (member, producer) in pairs or (member, None) in pairs,
    }
    sources = by_source(covered, sold, may.get(model.pots, lambda *_: True))
    if model.pots is Pots.INJECTORS:  # what the return to all makes unavoidable
        rows, columns = sums(sources, ids, producers)
        own = {i: wh - rows[i] for i, wh in covered.items()}
        for pair, wh in by_source(own, {j: wh - columns[j] for j, wh in sold.items()}, lambda *_: True).items():
            sources[pair] = sources.get(pair, 0) + wh
    else:  # a Wh that no pair can carry is not shared
        covered, sold = sums(sources, ids, producers)
    first: Exact = {}
    for offer in exact.offers:
        first = {**offer, **first}
    shared = Shared({i: floor(first.get(i, 0)) for i in ids}, covered, sold, sources, exact)
    if broken := violations(model, ordered, shared):
        msg = f"{name}: {'; '.join(broken)}"
        raise ContractBroken(msg)
    return shared


def violations(model: Model, slot: Slot, shared: Shared) -> list[str]:
    """Invariants that a shared slot breaks, in words; none is what it should be."""
    total, surplus = sum(shared.covered.values()), sum(slot.surplus.values())
    exactly = sum(shared.exact.covered.values(), Fraction(0))
    whole = floor(exactly)
    rows, columns = sums(shared.sources, slot.consumption, slot.surplus)
    exactly_sold = sum(shared.exact.sold.values(), Fraction(0))
    checks = {
        "a member gets less than 0 or more than it took": all(
            0 <= wh <= slot.consumption[i] for i, wh in shared.covered.items()
        ),
        "a producer sells less than 0 or more than it had": all(
            0 <= wh <= slot.surplus[j] for j, wh in shared.sold.items()
        ),
        "more is shared than there is": total <= surplus,
        "what is sold is not what is taken": total == sum(shared.sold.values()),
        "exactly, what is sold is not what is taken": exactly == exactly_sold,
        "sources do not sum up": (rows, columns) == (shared.covered, shared.sold),
        "the sum is not the exact one rounded down": total == whole or (model.pots is Pots.PAIRS and total < whole),
        "something is left that somebody needs": not model.uses_all
        or total == min(surplus, sum(slot.consumption.values())),
        "a seller is not credited pro rata": model.pots is not Pots.POOL
        or all(abs(wh * surplus - slot.surplus[j] * exactly) < surplus for j, wh in shared.sold.items() if surplus),
        "somebody gets what there is nobody else to give": model.pots is not Pots.INJECTORS
        or all(not wh or any(given for j, given in slot.surplus.items() if j != i) for i, wh in shared.covered.items()),
    }
    return [words for words, holds in checks.items() if not holds]


def _pro_rata(consumption: Mapping[str, int], among: Iterable[str]) -> Exact:
    ids = list(among)
    total = sum(consumption[i] for i in ids)
    return {i: Fraction(consumption[i], total) if total else Fraction(0) for i in ids}


def _renormalised(weights: Exact) -> Exact:
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()} if total else {}


def _plan(model: Model, slot: Slot) -> list[tuple[Fraction, Exact]]:
    """Of each round its part of the surplus, and each member's weight; what is repeated is not planned."""
    ids, one = slot.consumption, Fraction(1)
    if model.rounds is Rounds.ONE and model.weigh is not Weigh.KEY:
        weights = _pro_rata(ids, ids)
        if model.weigh is Weigh.QUOTIENT:
            weights = {i: Fraction(floor(weight * QUOTIENT), QUOTIENT) for i, weight in weights.items()}
        return [(one, weights)]
    mine = [key for key in slot.keys if key.member_id in ids]
    if model.rounds in (Rounds.ONE, Rounds.REPEATED):
        return [(one, {key.member_id or "": key.key or Fraction(0) for key in mine})]
    if model.rounds is Rounds.DECLARED:
        declared = {key.round: key.key for key in slot.keys if key.member_id is None and key.producer_id is None}
        rounds = sorted({key.round for key in mine} | set(declared))
        parts = declared if declared else {rounds[0]: one} if rounds else {}
        plan = []
        for number in rounds:
            of_round = [key for key in mine if key.round == number]
            fixed = {key.member_id or "": key.key for key in of_round if key.key is not None}
            rest = one - sum(fixed.values())
            floating = _pro_rata(ids, [key.member_id or "" for key in of_round if key.key is None])
            plan.append((parts.get(number) or Fraction(0), fixed | {i: w * rest for i, w in floating.items()}))
        return plan
    plan = []
    for number in sorted({key.tier for key in mine}):
        of_tier = [key for key in mine if key.tier == number]
        if model.rounds is Rounds.TIERS:
            plan.append((Fraction(not plan), _pro_rata(ids, [key.member_id or "" for key in of_tier])))
        else:
            keys = {key.member_id or "": key.key or Fraction(0) for key in of_tier}
            plan.append((Fraction(sum(keys.values())), _renormalised(keys)))
    return plan


def _of_pool(model: Model, slot: Slot) -> Exactly:
    """All surplus as one pot; what a round leaves is carried to the next."""
    surplus = sum(slot.surplus.values())
    need = {i: Fraction(wh) for i, wh in slot.consumption.items()}
    plan, carried, offers = _plan(model, slot), Fraction(0), []
    keys = dict(plan[0][1]) if plan else {}
    while plan:
        part, weights = plan.pop(0)
        pot = part * surplus + carried
        if model.rounds is Rounds.REPEATED:
            weights = _renormalised({i: weight for i, weight in keys.items() if need[i]})
        offer = {i: weight * pot for i, weight in weights.items()}
        offers.append(offer)
        for i, wh in offer.items():
            given = min(wh, need[i])
            need[i] -= given
            pot -= given
        if model.rounds is Rounds.REPEATED and pot and any(keys[i] and need[i] for i in keys):
            plan.append((Fraction(0), {}))
        carried = pot
    covered = {i: wh - need[i] for i, wh in slot.consumption.items()}
    return Exactly(covered, _credited(slot.surplus, sum(covered.values(), Fraction(0))), offers)


def _credited(surplus: Mapping[str, int], total: Fraction) -> Exact:
    """A total over producers pro rata of their surplus."""
    whole = sum(surplus.values())
    return {j: total * wh / whole if whole else Fraction(0) for j, wh in surplus.items()}


def _of_injectors(model: Model, slot: Slot) -> Exactly:
    """Flanders: each injector's surplus to the others; what was cut returns pro rata of injection."""
    need = {i: Fraction(wh) for i, wh in slot.consumption.items()}
    net = {j: Fraction(wh) for j, wh in slot.surplus.items()}
    keys: Exact = {}
    for key in slot.keys:
        if key.member_id in need and key.key:
            keys[key.member_id] = key.key
    offers: list[Exact] = []
    for _ in range(len(keys) + 1):  # each time nothing was cut, or one more has enough
        total = sum(keys.values(), Fraction(0))
        units: Exact = {}
        for j, wh in net.items():
            others = total - keys.get(j, 0)
            units[j] = wh / (others if model.renormalises else 1) if others else Fraction(0)
        everyone = sum(units.values(), Fraction(0))
        offer = {i: key * (everyone - units.get(i, 0)) for i, key in keys.items()}
        offers.append(offer)
        kept = {j: wh - units[j] * (total - keys.get(j, 0)) for j, wh in net.items()}
        given = {i: min(wh, need[i]) for i, wh in offer.items()}
        cut = sum(offer.values(), Fraction(0)) - sum(given.values(), Fraction(0))
        need |= {i: need[i] - wh for i, wh in given.items()}
        back = _returned(cut, net, {j: wh - kept[j] for j, wh in slot.surplus.items()})
        net = {j: wh + back[j] for j, wh in kept.items()}
        keys = {i: key for i, key in keys.items() if need[i]}
        if model.rounds is Rounds.ONE or not any(given.values()):
            break
    covered = {i: wh - need[i] for i, wh in slot.consumption.items()}
    return Exactly(covered, {j: wh - net[j] for j, wh in slot.surplus.items()}, offers)


def _returned(cut: Fraction, injection: Exact, room: Exact) -> Exact:
    """What was cut, over injectors pro rata of injection; what would be above what one gave is the others'.

    That limit is a convention: the protocol's own examples do not reach it.
    """
    back = dict.fromkeys(injection, Fraction(0))
    for _ in injection:  # each time all of it returns, or one more is full
        if not cut:
            break
        left = {j: room[j] - back[j] for j in injection}
        total = sum((injection[j] for j in injection if left[j]), Fraction(0))
        given = {j: min(cut * injection[j] / total, wh) for j, wh in left.items() if wh}
        back |= {j: back[j] + wh for j, wh in given.items()}
        cut -= sum(given.values())
    return back


def _of_pairs(_: Model, slot: Slot) -> Exactly:
    """France, full dynamic: a key per producer and member; what was cut stays with the producer."""
    offered: dict[str, Exact] = {i: {} for i in slot.consumption}
    for key in slot.keys:
        if key.member_id in offered and key.key:
            for j in [key.producer_id] if key.producer_id else slot.surplus:
                if j in slot.surplus:
                    offered[key.member_id][j] = offered[key.member_id].get(j, Fraction(0)) + key.key * slot.surplus[j]
    offer = {i: sum(of_member.values(), Fraction(0)) for i, of_member in offered.items()}
    covered = {i: min(wh, Fraction(slot.consumption[i])) for i, wh in offer.items()}
    sold = dict.fromkeys(slot.surplus, Fraction(0))
    for i, of_member in offered.items():
        for j, wh in of_member.items():
            sold[j] += wh * covered[i] / offer[i] if offer[i] else 0
    return Exactly(covered, sold, [offer])


def _of_sides(_: Model, slot: Slot) -> Exactly:
    """Luxembourg: the side that wants more than the other has shares by a model of its own, the other goes pro rata."""
    surplus, consumption = sum(slot.surplus.values()), sum(slot.consumption.values())
    of_consumption, of_production = slot.sides
    if surplus < consumption:
        return _of_pool(OF_SIDE[of_consumption], slot)
    keys = [key._replace(member_id=key.producer_id, producer_id=None) for key in slot.keys if key.member_id is None]
    turned = _of_pool(OF_SIDE[of_production], Slot(slot.surplus, {"": consumption}, tuple(keys)))
    covered = _credited(slot.consumption, sum(turned.covered.values(), Fraction(0)))
    return Exactly(covered, turned.covered, [{i: Fraction(wh) for i, wh in slot.consumption.items()}])


SHARE = {Pots.POOL: _of_pool, Pots.INJECTORS: _of_injectors, Pots.PAIRS: _of_pairs, Pots.SIDES: _of_sides}


class OperatorShare(NamedTuple):
    """What an Austrian operator reports of a slot, mWh (0.001 Wh; kWh with six decimals).

    Attributes:
        share: of each member, may be above its consumption.
        covered: the lesser of share and consumption.
        feed_in: of each producer what is left, never below 0.
    """

    share: dict[str, int]
    covered: dict[str, int]
    feed_in: dict[str, int]


def as_the_operator(consumption: Mapping[str, int], surplus: Mapping[str, int]) -> OperatorShare:
    """Austria's dynamic model as its operators compute it: each value rounded half-up by itself, no sum put right.

    S = half-up(C·P/ΣC), A = min(C, S), X = half-up(P_j·(P − ΣA)/P). Independent rounding may invent or lose some mWh.

    Args:
        consumption: mWh that take part, of each member.
        surplus: mWh of each producer.
    """
    taken, given = sum(consumption.values()), sum(surplus.values())
    share = {i: half_up(Fraction(wh * given, taken)) if taken else 0 for i, wh in consumption.items()}
    covered = {i: min(wh, share[i]) for i, wh in consumption.items()}
    left = max(given - sum(covered.values()), 0)
    feed_in = {j: half_up(Fraction(wh * left, given)) if given else 0 for j, wh in surplus.items()}
    return OperatorShare(share, covered, feed_in)
