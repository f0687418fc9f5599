"""Closed lists. A new word is added here first, never written as a literal elsewhere."""

from enum import StrEnum


class DeadLetterReason(StrEnum):
    """Why bytes could not be taken."""

    BAD_TOPIC = "bad_topic"
    UNKNOWN_ENCODING = "unknown_encoding"
    NOT_FRAMED = "not_framed"
    UNKNOWN_SCHEMA_ID = "unknown_schema_id"
    WRONG_ENTITY = "wrong_entity"
    UNDECODABLE = "undecodable"
    TRAILING_BYTES = "trailing_bytes"
    INVALID_JSON = "invalid_json"
    INVALID_TELEGRAM = "invalid_telegram"
    METER_ID_MISMATCH = "meter_id_mismatch"
    TOO_LARGE = "too_large"
    RUN_ID_REFUSED = "run_id_refused"


class Bucket(StrEnum):
    """Where one input record went: received is the sum of these."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    LATE = "late"
    QUARANTINED = "quarantined"
    INVALID = "invalid"


class DeltaReason(StrEnum):
    """Why a register step has the energy it has (docs/domain.md, Register steps)."""

    FIRST = "first"
    OK = "ok"
    GAP = "gap"
    ROLLOVER = "rollover"
    METER_EXCHANGE = "meter_exchange"
    RESET = "reset"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    OUT_OF_ORDER = "out_of_order"
    IMPLAUSIBLE = "implausible"
    GLITCH = "glitch"


ACCEPTED_DELTAS = (
    DeltaReason.FIRST,
    DeltaReason.OK,
    DeltaReason.GAP,
    DeltaReason.ROLLOVER,
    DeltaReason.METER_EXCHANGE,
    DeltaReason.RESET,
)


class QuarantineReason(StrEnum):
    """Why a decoded record is kept apart."""

    IMPOSSIBLE_CLOCK = "impossible_clock"
    CONFLICT = "conflict"
    IMPLAUSIBLE = "implausible"
    UNKNOWN_CODE = "unknown_code"
    UNKNOWN_ARGUMENT = "unknown_argument"


class IntervalQuality(StrEnum):
    """What the energy of an interval is worth."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    ESTIMATED = "estimated"
    INCOMPLETE = "incomplete"
    POWER_FAIL = "power_fail"
    MISSING = "missing"


class EstimationMethod(StrEnum):
    """How the energy of a validated interval is known."""

    REGISTER = "register"
    LINEAR = "linear"
    LIKE_DAY = "like_day"
    EVEN = "even"
    ZERO = "zero"


class ValidationRule(StrEnum):
    """What a validated interval is measured by."""

    GAP = "gap"
    LIMIT = "limit"
    SPIKE = "spike"
    FROZEN = "frozen"
    ZERO = "zero"


class Band(StrEnum):
    """Where a voltage lies against the limits of its jurisdiction."""

    NORMAL = "normal"
    LOW = "low"
    HIGH = "high"
    VERY_LOW = "very_low"
    VERY_HIGH = "very_high"


class GridLevel(StrEnum):
    """What meters are grouped by."""

    TRANSFORMER = "transformer"
    FEEDER = "feeder"


class ComplianceLevel(StrEnum):
    """What a verdict on voltage is of."""

    PHASE = "phase"
    METER = "meter"
    TRANSFORMER = "transformer"
    FEEDER = "feeder"


class Period(StrEnum):
    """What a verdict on voltage is over: a local day, or the seven that end with it."""

    DAY = "day"
    WEEK = "week"


class VoltageEvent(StrEnum):
    """What a meter's own counters tell of voltages that no reading shows."""

    SAG = "sag"
    SWELL = "swell"


class Severity(StrEnum):
    """Severity of an event type, as in the plan's table."""

    INFO = "info"
    CAUTION = "caution"
    ERROR = "error"


class EventAction(StrEnum):
    """What the nuisance table says to do with an event."""

    RAISE = "raise"
    COUNT = "count"
    DROP = "drop"


class Edge(StrEnum):
    """How an event moves its alarm: `level` takes the argument (1 raises, 0 clears)."""

    RAISE = "raise"
    CLEAR = "clear"
    LEVEL = "level"
    NONE = "none"


class AlarmState(StrEnum):
    """State of an alarm."""

    ACTIVE = "active"
    CLEARED = "cleared"


class OutageKind(StrEnum):
    """Of an outage that is over: up to five minutes, or longer."""

    MOMENTARY = "momentary"
    SUSTAINED = "sustained"


class ReliabilityLevel(StrEnum):
    """What customers are summed up by for SAIFI and SAIDI."""

    TRANSFORMER = "transformer"
    FEEDER = "feeder"
    FLEET = "fleet"


class AlarmSource(StrEnum):
    """What an alarm was made from."""

    METER_EVENT = "meter_event"
    DERIVED = "derived"


class SharingModel(StrEnum):
    """How a community shares a slot's surplus (docs/domain.md, Energy sharing)."""

    FLANDERS_FIXED = "flanders_fixed"
    FLANDERS_RELATIVE = "flanders_relative"
    FLANDERS_OPTIMAL = "flanders_optimal"
    AUSTRIA_STATIC = "austria_static"
    AUSTRIA_DYNAMIC = "austria_dynamic"
    GERMANY_STATIC = "germany_static"
    GERMANY_CASCADE = "germany_cascade"
    GERMANY_PROPORTIONAL = "germany_proportional"
    WALLONIA_ROUNDS = "wallonia_rounds"
    BRUSSELS_STATIC = "brussels_static"
    BRUSSELS_ROUNDS = "brussels_rounds"
    BRUSSELS_PRO_RATA = "brussels_pro_rata"
    FRANCE_STATIC = "france_static"
    FRANCE_DYNAMIC = "france_dynamic"
    FRANCE_PAIR = "france_pair"
    LUXEMBOURG = "luxembourg"
    PRIORITY = "priority"
    SPAIN_HOURLY = "spain_hourly"
    PORTUGAL_FIXED = "portugal_fixed"
    PORTUGAL_PROPORTIONAL = "portugal_proportional"
    PORTUGAL_HIERARCHICAL = "portugal_hierarchical"
    ITALY_HOURLY = "italy_hourly"


class SharingSide(StrEnum):
    """How Luxembourg shares among the points of one side, consumption or production."""

    PRO_RATA = "pro_rata"
    PRIORITY = "priority"
    PERCENTAGE = "percentage"


class EnergyFlow(StrEnum):
    """What of a member's energy has a price of its own in a community."""

    COVERED = "covered"
    RESIDUAL = "residual"
    SOLD = "sold"
    FEED_IN = "feed_in"


class SharingQuality(StrEnum):
    """What a member's energy of a slot is known by."""

    MEASURED = "measured"
    ESTIMATED = "estimated"
    INCOMPLETE = "incomplete"
    MISSING = "missing"


class FaultKind(StrEnum):
    """Faults that a replay injects; docs/replay.md says what can be decided about each, and by whom."""

    DUPLICATE = "duplicate"
    LATE = "late"
    REORDER = "reorder"
    GAP = "gap"
    CLOCK_JUMP = "clock_jump"
    CLOCK_1970 = "clock_1970"
    CLOCK_2099 = "clock_2099"
    RESET = "reset"
    ROLLOVER = "rollover"
    METER_EXCHANGE = "meter_exchange"
    SPIKE = "spike"
    FROZEN = "frozen"
    UNIT_SLIP = "unit_slip"
    POISON = "poison"
    POWER_STORM = "power_storm"
    VOLTAGE_ALARM = "voltage_alarm"
    TAMPER = "tamper"


class Poison(StrEnum):
    """What a poisoned record is."""

    NOT_FRAMED = "not_framed"
    UNKNOWN_SCHEMA_ID = "unknown_schema_id"
    UNDECODABLE = "undecodable"
    TRAILING_BYTES = "trailing_bytes"
    METER_ID_MISMATCH = "meter_id_mismatch"
    INVALID_JSON = "invalid_json"
    INVALID_TELEGRAM = "invalid_telegram"


class FaultOutcome(StrEnum):
    """What became of one record that an injected fault touched; docs/replay.md says which are allowed for which."""

    NOT_SENT = "not_sent"
    DUPLICATE = "duplicate"
    IN_ORDER = "in_order"
    OUT_OF_ORDER = "out_of_order"
    CONFLICT = "conflict"
    GAP = "gap"
    WIDE_STEP = "wide_step"
    AT_THE_END = "at_the_end"
    NO_REGISTER = "no_register"
    AHEAD = "ahead"
    IMPOSSIBLE_CLOCK = "impossible_clock"
    RESET = "reset"
    ROLLOVER = "rollover"
    METER_EXCHANGE = "meter_exchange"
    IMPLAUSIBLE = "implausible"
    PLAUSIBLE = "plausible"
    AGREED = "agreed"
    ZERO_STEP = "zero_step"
    NO_CHANGE = "no_change"
    DEAD_LETTER = "dead_letter"
    RAISED = "raised"
    REPEATED = "repeated"
    CLEARED = "cleared"
    STAYS_CLEARED = "stays_cleared"
    OF_SEVERAL_RUNS = "of_several_runs"
    UNEXPLAINED = "unexplained"
