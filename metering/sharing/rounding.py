"""Whole numbers of exact ones: energy in Wh, money in cents, and who delivered what, with sums that hold."""

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from math import floor

Cells = dict[tuple[str, str], int]


def largest_remainder(exact: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers whose sum is the exact sum rounded down; ties of remainders by id.

    Each is within 1 of its exact value, and none is above it rounded up, so a whole bound of it still holds.
    """
    whole = {name: floor(value) for name, value in exact.items()}
    left = floor(sum(exact.values())) - sum(whole.values())
    for name in sorted(exact, key=lambda each: (whole[each] - exact[each], each))[:left]:
        whole[name] += 1
    return whole


def half_up(value: Fraction) -> int:
    """The nearest whole number; of two the greater."""
    return floor(value + Fraction(1, 2))


def with_carry(amounts: Iterable[Fraction | int], unit: int = 1) -> list[int]:
    """Whole units of each amount in turn, what is left of a unit carried to the next.

    Args:
        amounts: in the order of time.
        unit: how much a whole one is: 1000 of Wh for kWh, 10,000,000 of 10⁻⁹ for cents.

    Returns:
        ⌊Σ to here / unit⌋ − ⌊Σ before / unit⌋ of each: their sum never drifts from the exact one by a whole unit.
    """
    done, total, given = 0, Fraction(0), []
    for amount in amounts:
        total += amount
        given.append(floor(total / unit) - done)
        done += given[-1]
    return given


def by_source(taken: Mapping[str, int], sold: Mapping[str, int], may: Callable[[str, str], bool]) -> Cells:
    """Who delivered what to whom: of each member and producer whole Wh, about pro rata of both.

    Args:
        taken: Wh of each member.
        sold: Wh of each producer; the same sum.
        may: (member, producer) → whether this producer delivers to this member.

    Returns:
        Wh that are not 0. They sum up to both, but for what no pair that may can carry: that is left out.
    """
    need = {name: wh for name, wh in sorted(taken.items()) if wh}
    left = {name: wh for name, wh in sorted(sold.items()) if wh}
    cells: Cells = {}

    def give(member: str, producer: str, wh: int) -> None:
        cells[member, producer] = cells.get((member, producer), 0) + wh
        need[member] -= wh
        left[producer] -= wh

    pairs = [(member, producer) for member in need for producer in left if may(member, producer)]
    while total := sum(left.values()):
        shares = [(pair, need[pair[0]] * left[pair[1]] // total) for pair in pairs]
        if not any(wh for _, wh in shares):
            break
        for pair, wh in shares:
            if wh:
                give(*pair, wh)
    for member, producer in pairs:
        if wh := min(need[member], left[producer]):
            give(member, producer, wh)
    stuck = [(member, producer) for member in need if need[member] for producer in left if left[producer]]
    for member, producer in stuck:  # others take this producer's instead, pro rata of what they have of the rest
        swaps = [pair for pair in sorted(cells) if cells[pair] and may(member, pair[1]) and may(pair[0], producer)]
        had = {pair: cells[pair] for pair in swaps}
        wanted, total = min(need[member], left[producer]), sum(had.values())
        parts = {pair: -(-wh * wanted // total) for pair, wh in had.items()}
        for most in (parts, had):
            for (other, source), share in most.items():
                wh = min(share, need[member], left[producer], cells[other, source])
                give(other, source, -wh)
                give(other, producer, wh)
                give(member, source, wh)
    return {pair: wh for pair, wh in sorted(cells.items()) if wh}


def sums(cells: Cells, members: Iterable[str], producers: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
    """What each member and each producer has of (member, producer) → Wh."""
    rows, columns = dict.fromkeys(members, 0), dict.fromkeys(producers, 0)
    for (member, producer), wh in cells.items():
        rows[member] += wh
        columns[producer] += wh
    return rows, columns
