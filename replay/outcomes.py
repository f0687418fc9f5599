"""What may become of a record that a fault touches: kind of fault → outcome → how it is recognised.

Expressions over the facts that `replay.verify` gathers, a row per record; docs/replay.md says the same in words.
"""

from datetime import timedelta

import polars as pl

from schemas.closed_lists import DeadLetterReason, DeltaReason, FaultKind, FaultOutcome, Poison, QuarantineReason

MAX_AHEAD, MAX_BEHIND = timedelta(hours=36), timedelta(days=400)
"""Where the alarms job takes the arrival for the meter's own time; the jobs' settings have the same."""
GAP_FACTOR = 1.5  # a step over more than so many intervals is a gap
NEAR_WH = 1_000  # how near to 0 a register begins again, where the fuse lets less through in an hour
NEARLY_FULL_S = 3_600  # and from so near to its end it rolls over, at the most that the fuse lets through
UNKNOWN_INTERVAL_S = 3_600  # how late a reading may be reported, where the registry knows no interval
STEP_SLACK_WH = 100  # the coarsest register counts in such steps: a step may be so much above the fuse's limit


def _is(reason: DeltaReason) -> pl.Expr:
    return pl.col("reason") == reason.value


SPAN_S = (pl.col("next_at") - pl.col("next_previous_at")).dt.total_microseconds() / 1e6
STEP_WH = pl.col("wh") - pl.col("previous_wh")
LIMIT_WH = pl.col("max_w") * (pl.col("stamped_at") - pl.col("previous_at")).dt.total_microseconds() / 3.6e9
"""The largest plausible step, less the register's own quantum."""
IS_EVENT = pl.col("topic") == "events"
ARRIVED = (pl.col("copies") >= 1) & (IS_EVENT | (pl.col("stamped_at") == pl.col("observed_at")))
PLAIN = _is(DeltaReason.OK) | _is(DeltaReason.GAP)
IS_APART = pl.col("quarantine").is_not_null() | pl.col("is_late")
TAKEN = ARRIVED & ~IS_APART
OF_ANOTHER = pl.col("quarantine") == QuarantineReason.IMPLAUSIBLE.value
FOLLOWS = ARRIVED & PLAIN & ~pl.col("is_late") & (~IS_APART | OF_ANOTHER)
"""The register's step is plain, though another register of the record may be wild."""
WILD = ARRIVED & (pl.col("quarantine") == QuarantineReason.IMPLAUSIBLE.value) & _is(DeltaReason.IMPLAUSIBLE)
IS_TOO_FAR = (STEP_WH < 0) | (STEP_WH > LIMIT_WH)
CAME_OLD = ARRIVED & pl.col("is_late") & _is(DeltaReason.OUT_OF_ORDER)
COLLIDED = ARRIVED & (pl.col("quarantine") == QuarantineReason.CONFLICT.value) & _is(DeltaReason.CONFLICT)
SAME = ARRIVED & _is(DeltaReason.DUPLICATE) & ~IS_APART
MISSING = pl.col("copies") == 0
HELD = (
    (pl.col("next_previous_at") == pl.col("before_at"))
    & (pl.col("next_previous_wh") == pl.col("before_wh"))
    & (pl.col("next_delta_wh") == pl.col("next_wh") - pl.col("before_wh"))
)
"""The next step goes from the last value before the hole to the first one after it: no energy is lost."""
IS_WIDE = SPAN_S > GAP_FACTOR * pl.col("interval_s")
CAME_AFTER = pl.col("is_reordered") | (pl.col("amount") < pl.col("interval_s"))
CATCHES_UP = (pl.col("next_previous_wh") == pl.col("wh")) & (
    pl.col("next_delta_wh") == pl.col("next_wh") - pl.col("wh")
)
HOLE = {
    FaultOutcome.NO_REGISTER: MISSING & pl.col("register").is_null(),
    FaultOutcome.AT_THE_END: MISSING & ~pl.col("has_later"),
    FaultOutcome.GAP: MISSING & HELD & IS_WIDE & (pl.col("next_reason") == DeltaReason.GAP.value),
    FaultOutcome.WIDE_STEP: MISSING
    & HELD
    & ~IS_WIDE.fill_null(False)
    & (pl.col("next_reason") == DeltaReason.OK.value),
}
SAID = {
    outcome: ARRIVED & (pl.col("change") == outcome.value) & pl.col("is_found")
    for outcome in (FaultOutcome.RAISED, FaultOutcome.REPEATED, FaultOutcome.CLEARED, FaultOutcome.STAYS_CLEARED)
}
NEAR_LIMIT_WH = LIMIT_WH.fill_null(NEAR_WH)
NEARLY_FULL_WH = pl.min_horizontal(
    NEAR_LIMIT_WH, pl.col("max_w") * pl.max_horizontal(pl.lit(NEARLY_FULL_S), "interval_s") / 3600
)
BECAME_RESET = WILD & (pl.col("became") == DeltaReason.RESET.value) & (pl.col("became_wh") == pl.col("wh"))
"""It was held, and the next value followed from it."""
LOST_CLOCK = {
    FaultOutcome.IMPOSSIBLE_CLOCK: ARRIVED
    & (pl.col("quarantine") == QuarantineReason.IMPOSSIBLE_CLOCK.value)
    & (pl.col("quarantine_voltage") == QuarantineReason.IMPOSSIBLE_CLOCK.value)
}
FAULT_WH = (
    pl.when(pl.col("kind") == FaultKind.UNIT_SLIP.value)
    .then(pl.col("wh") - pl.col("wh") / pl.col("amount"))
    .otherwise(pl.col("amount"))
)
"""How much a value was raised by its fault."""
TOO_MUCH = {
    FaultOutcome.IMPLAUSIBLE: WILD & IS_TOO_FAR,
    # it follows from a value that is as wild: two that agree are a new segment, until the true ones come back
    FaultOutcome.AGREED: FOLLOWS
    & pl.col("is_of_inferred")
    & (FAULT_WH > LIMIT_WH + STEP_SLACK_WH)
    & STEP_WH.is_between(0, LIMIT_WH + STEP_SLACK_WH),
    # no limit, or little enough to be true
    FaultOutcome.PLAUSIBLE: FOLLOWS & ~(FAULT_WH > LIMIT_WH + STEP_SLACK_WH).fill_null(False),
}
FORWARD = pl.col("amount") > 0
AHEAD_S = (pl.col("stamped_at") - pl.col("due_at")).dt.total_microseconds() / 1e6
JUMPED = (AHEAD_S - pl.col("amount")).is_between(-1 - pl.col("interval_s").fill_null(UNKNOWN_INTERVAL_S), 1)
"""A meter reports within an interval of its reading: what is more is its clock's."""
JUMPED_TOO_FAR = ~pl.col("amount").is_between(-MAX_BEHIND.total_seconds(), MAX_AHEAD.total_seconds())
POISONED = pl.when((pl.col("to") == "kafka") & pl.col("detail").is_in([Poison.INVALID_JSON, Poison.INVALID_TELEGRAM]))
EXPECTED_LETTER = POISONED.then(pl.lit(DeadLetterReason.NOT_FRAMED.value)).otherwise(pl.col("detail"))
"""JSON and telegrams come by MQTT; in Kafka they are bytes without a frame."""

RULES: dict[FaultKind, dict[FaultOutcome, pl.Expr]] = {
    FaultKind.DUPLICATE: {FaultOutcome.DUPLICATE: (pl.col("copies") >= 2) & (pl.col("duplicates") >= 1) & PLAIN},
    FaultKind.LATE: {
        FaultOutcome.OUT_OF_ORDER: CAME_AFTER & CAME_OLD,
        FaultOutcome.IN_ORDER: CAME_AFTER & TAKEN & PLAIN,  # it came within one batch, which is sorted
    },
    FaultKind.REORDER: {
        FaultOutcome.OUT_OF_ORDER: pl.col("is_reordered") & CAME_OLD,
        FaultOutcome.IN_ORDER: pl.col("is_reordered") & TAKEN & PLAIN,
    },
    FaultKind.GAP: HOLE,
    FaultKind.CLOCK_JUMP: {
        FaultOutcome.IMPOSSIBLE_CLOCK: JUMPED & JUMPED_TOO_FAR & LOST_CLOCK[FaultOutcome.IMPOSSIBLE_CLOCK],
        FaultOutcome.CONFLICT: JUMPED & COLLIDED,
        FaultOutcome.DUPLICATE: JUMPED & SAME,
        FaultOutcome.IMPLAUSIBLE: JUMPED & WILD & IS_TOO_FAR,
        FaultOutcome.OUT_OF_ORDER: JUMPED & ~FORWARD & CAME_OLD,
        FaultOutcome.AHEAD: JUMPED & FORWARD & TAKEN & PLAIN,
        FaultOutcome.IN_ORDER: JUMPED & ~FORWARD & TAKEN & PLAIN,  # within one batch, and no reading has its stamp
    },
    FaultKind.CLOCK_1970: LOST_CLOCK,
    FaultKind.CLOCK_2099: LOST_CLOCK,
    FaultKind.RESET: {
        FaultOutcome.RESET: BECAME_RESET & (pl.col("previous_wh") == pl.col("amount")),
        FaultOutcome.NO_CHANGE: TAKEN & PLAIN & (pl.col("previous_wh") == 0) & (pl.col("amount") == 0),
        # it begins nothing: no value follows from it, or it is far from 0
        FaultOutcome.IMPLAUSIBLE: WILD & pl.col("became").ne_missing(DeltaReason.RESET.value),
    },
    FaultKind.ROLLOVER: {
        FaultOutcome.ROLLOVER: TAKEN
        & _is(DeltaReason.ROLLOVER)
        & (pl.col("delta_wh") == pl.col("amount") - pl.col("previous_wh") + pl.col("wh")),
        FaultOutcome.RESET: BECAME_RESET & (pl.col("amount") - pl.col("previous_wh") > NEARLY_FULL_WH),
        FaultOutcome.IMPLAUSIBLE: WILD
        & (
            (pl.col("amount") - pl.col("previous_wh") + pl.col("wh") > NEAR_LIMIT_WH)
            | (pl.col("amount") - pl.col("previous_wh") > NEARLY_FULL_WH)
        ),
    },
    FaultKind.METER_EXCHANGE: {
        FaultOutcome.METER_EXCHANGE: TAKEN
        & _is(DeltaReason.METER_EXCHANGE)
        & (pl.col("delta_wh") == 0)
        & ((pl.col("wh") >= pl.col("amount")) | (pl.col("previous_wh") == 0))
    },
    FaultKind.SPIKE: TOO_MUCH,
    FaultKind.UNIT_SLIP: TOO_MUCH,
    FaultKind.FROZEN: {FaultOutcome.ZERO_STEP: TAKEN & PLAIN & (pl.col("delta_wh") == 0) & CATCHES_UP},
    FaultKind.POISON: {
        FaultOutcome.DEAD_LETTER: MISSING & (pl.col("letters") >= 1) & (pl.col("letter_reason") == EXPECTED_LETTER)
    },
    FaultKind.POWER_STORM: {
        **{outcome: ~IS_EVENT & rule for outcome, rule in HOLE.items()},
        **{outcome: IS_EVENT & rule for outcome, rule in SAID.items()},
    },
    FaultKind.VOLTAGE_ALARM: SAID,
    FaultKind.TAMPER: {
        FaultOutcome.RAISED: SAID[FaultOutcome.RAISED],
        FaultOutcome.REPEATED: SAID[FaultOutcome.REPEATED],
    },
}
"""Kind of fault → what may become of a record that it touches, and how that is recognised; the first that holds."""


def judged(facts: pl.DataFrame) -> pl.DataFrame:
    """The facts with `outcome`: `unexplained` where no rule of its kind holds.

    What became of a record of a meter that other runs played too depends on theirs: there the rules cannot decide.
    """
    kind = pl.col("kind")
    cases = [
        pl.when((kind == fault.value) & rule.fill_null(False)).then(pl.lit(outcome.value))
        for fault, rules in RULES.items()
        for outcome, rule in rules.items()
    ]
    not_sent = pl.when(~pl.col("was_sent")).then(pl.lit(FaultOutcome.NOT_SENT.value))
    shared = pl.when("is_shared").then(pl.lit(FaultOutcome.OF_SEVERAL_RUNS.value))
    return facts.with_columns(outcome=pl.coalesce(not_sent, *cases, shared, pl.lit(FaultOutcome.UNEXPLAINED.value)))
