"""Verify, and damage by hand, in one file: all of it goes by five lakes, which take long to make."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from replay.__main__ import app
from replay.dirt.entries import Entry
from replay.outcomes import RULES
from replay.run.ledger import run_folder
from replay.verify import verify
from schemas.closed_lists import FaultKind, FaultOutcome, Poison
from schemas.errors import ConfigError
from tests.run_lake import DIRT, METERS, at_fault, chain, change, decided, low, named, scored, table


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A lake of each kind: in one batch, in many small ones, with a storm, without any fault."""
    storm = [Entry(kind=FaultKind.POWER_STORM, by="20m", at="2h")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {
            "one batch": chain(tmp_path_factory.mktemp("one"), 1, DIRT, monkeypatch),
            "many batches": chain(tmp_path_factory.mktemp("many"), 20, DIRT, monkeypatch),
            "storm": chain(tmp_path_factory.mktemp("storm"), 4, storm, monkeypatch),
            "twice": chain(tmp_path_factory.mktemp("twice"), 20, DIRT, monkeypatch, is_repeated=True),
            "clean": chain(tmp_path_factory.mktemp("clean"), 4, [], monkeypatch),
        }


@pytest.fixture
def lake(homes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a copy of one of the lakes the home."""

    def take(name: str) -> None:
        shutil.copytree(homes[name], tmp_path / "home")
        monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path / "home"))

    return take


@pytest.mark.parametrize("name", ["one batch", "many batches", "storm", "clean"])
def test_a_run_is_balanced_and_every_fault_explained(lake: Callable[[str], None], name: str) -> None:
    lake(name)
    verdict = verify("r1")
    assert verdict.findings.rows() == []
    assert verdict.faults.filter(~pl.col("is_explained")).rows() == []
    assert verdict.is_balanced
    totals = verdict.totals
    assert totals["sent"] == sum(totals[name] for name in ("stored", "duplicate", "late", "quarantined", "invalid"))
    per_meter = pl.read_parquet(run_folder("r1") / "verify.parquet")
    assert len(per_meter) == METERS
    assert per_meter.get_column("wrong").unique().to_list() == [""]


@pytest.mark.parametrize("run_id", ["r1", "r2"])
def test_a_run_whose_meters_another_played_too_is_balanced_and_says_what_it_does_not_judge(
    lake: Callable[[str], None], run_id: str
) -> None:
    lake("twice")
    verdict = verify(run_id)
    assert verdict.findings.rows() == []
    assert verdict.is_balanced
    assert any(f"{METERS} meters have readings of other runs too" in note for note in verdict.notes)


def test_a_record_that_is_lost_is_found_where_another_run_played_the_meter_too(lake: Callable[[str], None]) -> None:
    lake("twice")
    meter = change("readings", (pl.col("run_id") == "r2") & (pl.col("meter_id") == "m0000004"))
    assert meter in named(verify("r2"))
    assert verify("r1").is_balanced


def outcomes(name: str, lake: Callable[[str], None]) -> dict[str, set[str]]:
    lake(name)
    return {kind: set(each["outcomes"]) for kind, each in verify("r1").kinds().items()}


def test_what_the_stream_decides_is_the_outcome(lake: Callable[[str], None]) -> None:
    assert outcomes("many batches", lake) == {
        "clock_1970": {"impossible_clock"}, "clock_2099": {"impossible_clock"},
        "clock_jump": {"ahead", "conflict", "implausible", "out_of_order"}, "duplicate": {"duplicate"},
        "frozen": {"zero_step"}, "gap": {"gap"}, "late": {"out_of_order"}, "meter_exchange": {"meter_exchange"},
        "poison": {"dead_letter"},
        "reorder": {"in_order"}, "reset": {"reset"}, "rollover": {"rollover"}, "spike": {"implausible"},
        "tamper": {"raised"}, "unit_slip": {"implausible"}, "voltage_alarm": {"cleared", "raised"},
    }  # fmt: skip


def test_within_one_batch_what_came_late_is_in_order(lake: Callable[[str], None]) -> None:
    found = outcomes("one batch", lake)
    assert found["late"] == found["reorder"] == {"in_order"}
    assert found["clock_jump"] == {"ahead", "conflict", "implausible", "in_order"}


@pytest.mark.parametrize(
    "name",
    [
        "readings", "events", "consumption_deltas", "voltage_windows", "late_readings", "quarantined_readings",
        "dead_letters", "alarms",
    ],
)  # fmt: skip
def test_a_removed_row_is_found_and_its_meter_named(lake: Callable[[str], None], name: str) -> None:
    lake("many batches")
    row = pl.col("row") == len(pl.read_parquet(table(name))) // 2
    meter = change(name, row)
    verdict = verify("r1")
    assert not verdict.is_balanced
    assert named(verdict) == {meter}


@pytest.mark.parametrize("name", ["readings", "consumption_deltas", "voltage_windows", "alarms", "late_readings"])
def test_a_doubled_row_is_found_and_its_meter_named(lake: Callable[[str], None], name: str) -> None:
    lake("many batches")
    rows = pl.read_parquet(table(name))
    twice = rows.slice(len(rows) // 2, 1)
    pl.concat([rows, twice]).write_parquet(table(name))
    verdict = verify("r1")
    assert not verdict.is_balanced
    if name != "readings":  # there it may be a redelivered record, which only the accounting denies
        assert twice.get_column("meter_id")[0] in named(verdict)


def test_a_removed_line_of_the_accounting_is_found(lake: Callable[[str], None]) -> None:
    lake("clean")
    stages = {"readings_lake", "consumption_deltas", "voltage_deviation", "alarms"}
    for stage in stages:
        change("accounting", (pl.col("stage") == stage) & (pl.col("received") > 0))
    assert set(verify("r1").findings.get_column("place")) == stages


def test_lost_records_are_named_by_their_seqs_in_the_middle_and_at_the_end(lake: Callable[[str], None]) -> None:
    lake("clean")
    rows = pl.read_parquet(table("readings"))
    is_lost = (pl.col("meter_id") == "m0000003") & pl.col("seq").is_in([17, 18, 143])
    rows.filter(~is_lost).write_parquet(table("readings"))
    verdict = verify("r1")
    wrong = verdict.meters.row(by_predicate=pl.col("meter_id") == "m0000003", named=True)
    assert wrong["lost"] == verdict.totals["lost"] == 3
    assert "3 of 144 lost: seq 17, 18, 143" in wrong["wrong"]
    assert named(verdict) == {"m0000003"}


def test_a_redelivered_record_is_no_loss(lake: Callable[[str], None]) -> None:
    """All jobs see it: a copy of a row as NATS gives it after a reconnect, one offset on."""
    lake("clean")
    rows = pl.read_parquet(table("events"))
    copy = rows.head(1).with_columns(offset=pl.col("offset") + 100_000)
    pl.concat([rows, copy]).write_parquet(table("events"))
    for stage in ("readings_lake", "alarms", "consumption_deltas"):
        change(
            "accounting",
            (pl.col("stage") == stage) & (pl.col("run_id") == "r1") & pl.struct("stage", "run_id").is_first_distinct(),
            received=pl.col("received") + 1,
            duplicate=pl.col("duplicate") + 1,
        )
    verdict = verify("r1")
    assert verdict.is_balanced, verdict.findings
    assert (verdict.totals["redelivered"], verdict.totals["duplicate"], verdict.totals["lost"]) == (1, 1, 0)


def test_records_that_change_places_are_found_where_no_fault_moved_them(lake: Callable[[str], None]) -> None:
    lake("clean")
    rows = pl.read_parquet(table("readings"))
    mine = rows.filter(pl.col("meter_id") == "m0000005").sort("seq")
    first, second = mine.row(50, named=True), mine.row(51, named=True)
    swap = {first["offset"]: second["offset"], second["offset"]: first["offset"]}
    closed_now = mine.with_columns(pl.col("offset").replace(swap))
    others = rows.filter(pl.col("meter_id") != "m0000005")
    pl.concat([others, closed_now]).write_parquet(table("readings"))
    verdict = verify("r1")
    assert verdict.totals["reordered"] == 1
    assert named(verdict) == {"m0000005"}
    assert "not in the order they were sent in: seq 50" in verdict.findings.row(0, named=True)["finding"]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("readings", {"import_w": pl.col("import_w") + 1}),
        ("consumption_deltas", {"wh": pl.col("wh") + 1}),
        ("consumption_deltas", {"delta_wh": pl.col("delta_wh") + 1}),
        ("voltage_windows", {"max_mv": pl.col("max_mv") + 1}),
        ("voltage_windows", {"sample_count": pl.col("sample_count") + 1}),
        ("alarms", {"raised_at": pl.col("raised_at") + timedelta(seconds=1)}),
        ("accounting", {"stored": pl.col("stored") - 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_changed_value_is_found(lake: Callable[[str], None], name: str, columns: dict[str, pl.Expr]) -> None:
    lake("clean")
    change(name, pl.col("row") == 0, **columns)
    assert not verify("r1").is_balanced


DAMAGE: list[tuple[FaultKind, str, str, dict[str, Any]]] = [
    (FaultKind.DUPLICATE, "consumption_deltas", "duplicate", {"reason": pl.lit("ok")}),
    (FaultKind.LATE, "consumption_deltas", "out_of_order", {"reason": pl.lit("ok")}),
    (FaultKind.GAP, "consumption_deltas", "gap", {"reason": pl.lit("ok")}),
    (FaultKind.CLOCK_JUMP, "quarantined_readings", "conflict", {}),
    (FaultKind.CLOCK_1970, "quarantined_readings", "impossible_clock", {"reason": pl.lit("conflict")}),
    (FaultKind.CLOCK_2099, "quarantined_readings", "impossible_clock", {}),
    (FaultKind.RESET, "consumption_deltas", "reset", {"delta_wh": pl.col("delta_wh") + 1}),
    (FaultKind.ROLLOVER, "consumption_deltas", "rollover", {"delta_wh": pl.col("delta_wh") + 1}),
    (FaultKind.METER_EXCHANGE, "consumption_deltas", "meter_exchange", {"reason": pl.lit("ok")}),
    (FaultKind.SPIKE, "quarantined_readings", "implausible", {}),
    (FaultKind.UNIT_SLIP, "quarantined_readings", "implausible", {"reason": pl.lit("conflict")}),
    (FaultKind.POISON, "dead_letters", "invalid_json", {"payload": pl.lit(b"{}")}),
    (FaultKind.LATE, "late_readings", "out_of_order", {}),
    (FaultKind.GAP, "consumption_deltas", "gap", {"delta_wh": pl.col("delta_wh") - 1}),
    (FaultKind.SPIKE, "consumption_deltas", "implausible", {"reason": pl.lit("ok")}),
    (FaultKind.POISON, "dead_letters", "not_framed", {"reason": pl.lit("undecodable")}),
]
"""What is done to the row of a fault that tells what became of it: first a round of one each, then some more."""


@pytest.mark.parametrize("damage", [DAMAGE[:12], DAMAGE[12:]], ids=["one of each kind", "more"])
def test_a_fault_of_which_something_else_became_is_unexplained_and_only_that(
    lake: Callable[[str], None], damage: list[tuple[FaultKind, str, str, dict[str, Any]]]
) -> None:
    lake("many batches")
    meters = set()
    for kind, name, reason, columns in damage:
        which = at_fault(kind) & (pl.col("reason") == reason)
        if name == "consumption_deltas":
            which &= pl.col("register") == "import_t1"
        meters.add((kind.value, change(name, which, **columns)))
    faults = verify("r1").faults.filter(~pl.col("is_explained"))
    assert set(faults.select("kind", "meter_id").iter_rows()) == meters


def test_a_step_that_does_not_follow_from_the_one_before_is_found_on_any_register(lake: Callable[[str], None]) -> None:
    lake("many batches")
    meters: list[str | None] = []
    for reason, columns in (
        ("gap", {"reason": pl.lit("ok")}),
        ("ok", {"reason": pl.lit("gap")}),
        ("meter_exchange", {"reason": pl.lit("ok")}),
        ("ok", {"previous_wh": pl.col("previous_wh") + 1, "delta_wh": pl.col("delta_wh") - 1}),
    ):
        which = (pl.col("reason") == reason) & (pl.col("register") == "export_t1")
        meters.append(change("consumption_deltas", which & ~pl.col("meter_id").is_in(meters), **columns))
    findings = verify("r1").findings.filter(pl.col("finding").str.contains("do not follow"))
    assert Counter(findings.get_column("meter_id")) == Counter(meters)


def test_a_frozen_meter_that_steps_is_unexplained(lake: Callable[[str], None]) -> None:
    lake("many batches")
    row = pl.read_parquet(run_folder("r1") / "faults.parquet").filter(pl.col("kind") == "frozen").row(0, named=True)
    which = (pl.col("meter_id") == row["meter_id"]) & (pl.col("observed_at") == row["observed_at"])
    change("consumption_deltas", which & (pl.col("register") == "import_t1"), delta_wh=pl.lit(1))
    assert verify("r1").faults.filter(~pl.col("is_explained")).get_column("kind").to_list() == ["frozen"]


@pytest.mark.parametrize(
    ("name", "kind", "alarm_type"),
    [
        ("many batches", FaultKind.TAMPER, "tamper_detect"),
        ("many batches", FaultKind.VOLTAGE_ALARM, "under_voltage"),
        ("storm", FaultKind.POWER_STORM, "power_failure"),
    ],
)
def test_an_alarm_that_was_not_raised_leaves_its_fault_unexplained(
    lake: Callable[[str], None], name: str, kind: FaultKind, alarm_type: str
) -> None:
    lake(name)
    faults = pl.read_parquet(run_folder("r1") / "faults.parquet").filter(
        (pl.col("kind") == kind.value) & (pl.col("topic") == "events")
    )
    said = faults.sort("due_at").row(0, named=True)
    which = (pl.col("meter_id") == said["meter_id"]) & (pl.col("alarm_type") == alarm_type)
    change("alarms", which & (pl.col("updated_at") == said["due_at"]))
    verdict = verify("r1")
    assert verdict.faults.filter(~pl.col("is_explained")).get_column("kind").to_list() == [kind.value]
    assert said["meter_id"] in named(verdict)


def test_a_fault_that_did_not_happen_is_unexplained_whatever_its_kind(lake: Callable[[str], None]) -> None:
    """The strictest test of the rules: none of them takes an ordinary record for a fault of its kind."""
    lake("clean")
    path = run_folder("r1") / "faults.parquet"
    schema = pl.read_parquet(path).schema
    readings = pl.read_parquet(table("readings")).filter(pl.col("seq") == 70).sort("meter_id")
    untrue: list[dict[str, Any]] = []
    amounts = {
        FaultKind.LATE: 2_700, FaultKind.CLOCK_JUMP: 3_600, FaultKind.RESET: 5_000_000, FaultKind.ROLLOVER: 10**8,
        FaultKind.METER_EXCHANGE: 700, FaultKind.SPIKE: 500_000, FaultKind.UNIT_SLIP: 1_000,
    }  # fmt: skip
    ordinary = [kind for kind in FaultKind if kind not in (FaultKind.VOLTAGE_ALARM, FaultKind.TAMPER)]
    for number, kind in enumerate(ordinary):
        row = readings.row(number, named=True)
        untrue.append(
            {
                "fault_id": number, "kind": kind.value, "meter_id": row["meter_id"], "topic": "readings", "seq": 70,
                "due_at": row["sent_at"], "observed_at": row["observed_at"], "amount": amounts.get(kind),
                "is_sent": kind not in (FaultKind.GAP, FaultKind.POWER_STORM),
                "detail": "not_framed" if kind == FaultKind.POISON else "import_t1_wh" if kind in amounts else None,
                "payload": b"poison" if kind == FaultKind.POISON else None,
            }
        )  # fmt: skip
    pl.DataFrame(untrue, schema=schema).write_parquet(path)
    faults = verify("r1").faults
    assert faults.filter(pl.col("is_explained")).get_column("kind").to_list() == []


def test_each_reason_and_alarm_type_is_scored_against_the_truth(lake: Callable[[str], None]) -> None:
    """As many as the faults of `DIRT` ask for, on two registers a meter, and the power failures of the tape."""
    lake("many batches")
    verdict = verify("r1")
    found = scored(verdict)
    assert {place: row["expected"] for place, row in found.items()} == {
        ("alarms", "power_failure"): 60, ("alarms", "tamper_detect"): 7, ("alarms", "under_voltage"): 2,
        ("consumption_deltas", "conflict"): 8, ("consumption_deltas", "duplicate"): 4,
        ("consumption_deltas", "gap"): 25, ("consumption_deltas", "implausible"): 5,
        ("consumption_deltas", "meter_exchange"): 2, ("consumption_deltas", "out_of_order"): 2,
        ("consumption_deltas", "reset"): 2, ("consumption_deltas", "rollover"): 1,
        ("quarantined_readings", "conflict"): 8, ("quarantined_readings", "implausible"): 3,
        ("quarantined_readings", "impossible_clock"): 6,
        **{("dead_letters", poison.value): 1 for poison in Poison},
    }  # fmt: skip
    assert all((row["precision"], row["recall"]) == (1, 1) for row in found.values())
    undecidable = {row["cause"]: row["records"] for row in verdict.scores.undecidable.iter_rows(named=True)}
    assert undecidable == {"clock_jump": 5, "frozen": 3, "reorder": 1}
    assert sum(row["undecidable"] for (_, reason), row in found.items() if reason != "implausible") == 6 + 2 + 14


@pytest.mark.parametrize("name", ["one batch", "storm", "clean", "twice"])
def test_no_figure_is_low_where_all_is_right(lake: Callable[[str], None], name: str) -> None:
    lake(name)
    verdict = verify("r1")
    assert low(verdict) == set()
    assert len(verdict.scores.table) > 1


SCORED = [
    ("consumption_deltas", "reason", "conflict"), ("consumption_deltas", "reason", "duplicate"),
    ("consumption_deltas", "reason", "gap"), ("consumption_deltas", "reason", "implausible"),
    ("consumption_deltas", "reason", "meter_exchange"), ("consumption_deltas", "reason", "out_of_order"),
    ("consumption_deltas", "reason", "reset"), ("consumption_deltas", "reason", "rollover"),
    ("quarantined_readings", "reason", "conflict"), ("quarantined_readings", "reason", "implausible"),
    ("quarantined_readings", "reason", "impossible_clock"), ("dead_letters", "reason", "trailing_bytes"),
    ("alarms", "alarm_type", "power_failure"), ("alarms", "alarm_type", "tamper_detect"),
    ("alarms", "alarm_type", "under_voltage"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "reason"), SCORED)
def test_a_row_that_is_missing_lowers_the_recall_of_its_reason(
    lake: Callable[[str], None], name: str, column: str, reason: str
) -> None:
    lake("many batches")
    change(name, (pl.col(column) == reason) & (decided() if name != "dead_letters" else pl.lit(True)))
    verdict = verify("r1")
    row = scored(verdict)[name, reason]
    assert (row["expected"] - row["right"], row["precision"]) == (1, 1 if row["right"] else None)
    assert (row["recall"] < 0.99) == ((name, reason) in low(verdict))
    assert not verdict.is_balanced


@pytest.mark.parametrize(("name", "column", "reason"), SCORED)
def test_a_row_that_should_not_be_lowers_the_precision_of_its_reason(
    lake: Callable[[str], None], name: str, column: str, reason: str
) -> None:
    lake("many batches")
    another = {
        "alarms": "power_failure" if reason == "tamper_detect" else "tamper_detect",
        "dead_letters": "undecodable",
    }
    another["consumption_deltas"] = "ok"
    another["quarantined_readings"] = "impossible_clock" if reason == "conflict" else "conflict"
    which = (pl.col(column) == another[name]) & (decided() if name != "dead_letters" else pl.lit(True))
    change(name, which, **{column: pl.lit(reason)})
    verdict = verify("r1")
    row = scored(verdict)[name, reason]
    assert (row["found"] - row["right"], row["recall"]) == (1, 1)
    assert (row["precision"] < 0.99) == ((name, reason) in low(verdict))
    assert not verdict.is_balanced


def test_what_the_broker_brought_again_is_no_wrong_duplicate(lake: Callable[[str], None]) -> None:
    lake("clean")
    readings, steps = pl.read_parquet(table("readings")), pl.read_parquet(table("consumption_deltas"))
    again = readings.filter((pl.col("meter_id") == "m0000004") & (pl.col("seq") == 20))
    copied = again.with_columns(offset=pl.col("offset") + 900)
    none = {name: pl.lit(None, steps.schema[name]) for name in ("previous_at", "previous_wh", "delta_wh", "segment_id")}
    twice = steps.join(again, on=["meter_id", "observed_at"], how="semi").with_columns(
        reason=pl.lit("duplicate"), **none
    )
    pl.concat([steps, twice]).write_parquet(table("consumption_deltas"))
    wrong = scored(verify("r1"))["consumption_deltas", "duplicate"]
    assert (wrong["expected"], wrong["found"], wrong["precision"], wrong["undecidable"]) == (0, 2, 0, 0)
    pl.concat([readings, copied]).write_parquet(table("readings"))
    verdict = verify("r1")
    right = scored(verdict)["consumption_deltas", "duplicate"]
    assert (right["expected"], right["found"], right["precision"], right["undecidable"]) == (0, 0, None, 2)
    assert verdict.scores.undecidable.select("cause", "records").rows() == [("redelivered", 1)]
    assert low(verdict) == set()


def test_whether_a_late_record_was_in_order_is_told_by_the_step_after_it_and_both_must_agree(
    lake: Callable[[str], None],
) -> None:
    lake("one batch")
    assert ("late", 1) in verify("r1").scores.undecidable.select("cause", "records").rows()
    late = pl.read_parquet(run_folder("r1") / "faults.parquet").filter(pl.col("kind") == "late").row(0, named=True)
    which = (pl.col("meter_id") == late["meter_id"]) & (pl.col("observed_at") == late["observed_at"])
    change("consumption_deltas", which, reason=pl.lit("out_of_order"))
    assert ("consumption_deltas", "out_of_order") in low(verify("r1"))


def test_without_a_limit_no_spike_is_due_and_what_is_said_of_it_is_undecidable(lake: Callable[[str], None]) -> None:
    lake("many batches")
    known = pl.read_parquet(table("registry"))
    unlimited = known.with_columns(fuse_a=pl.lit(None, pl.Int64), is_unlimited=pl.lit(True))
    unlimited.write_parquet(table("registry"))
    verdict = verify("r1")
    row = scored(verdict)["consumption_deltas", "implausible"]
    assert (row["expected"], row["found"], row["precision"], row["recall"]) == (2, 2, 1, 1)  # of a reset, held first
    assert row["undecidable"] >= 3
    assert {"spike", "unit_slip"} <= set(verdict.scores.undecidable.get_column("cause"))


def test_an_event_that_is_called_late_and_was_not_lowers_the_recall_of_its_alarm(lake: Callable[[str], None]) -> None:
    lake("clean")
    events = pl.read_parquet(table("events"))
    tamper = events.filter(pl.col("code") == "AE47").head(1)
    apart = pl.read_parquet(table("late_events"))
    called = tamper.with_columns(reason=pl.lit("out_of_order"), stage=pl.lit("alarms")).select(apart.columns)
    pl.concat([apart, called]).write_parquet(table("late_events"))
    change("alarms", (pl.col("alarm_type") == "tamper_detect") & (pl.col("meter_id") == tamper["meter_id"][0]))
    row = scored(verify("r1"))["alarms", "tamper_detect"]
    assert (row["expected"], row["found"], row["right"], row["precision"]) == (6, 5, 5, 1)


def test_every_kind_of_fault_has_rules_of_its_own() -> None:
    assert set(RULES) == set(FaultKind)
    assert all(rules and FaultOutcome.UNEXPLAINED not in rules for rules in RULES.values())


def test_without_a_run_a_ledger_or_a_lake_it_is_wrong_use(
    lake: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake("clean")
    with pytest.raises(ConfigError, match="no run r2 .* there are: r1"):
        verify("r2")
    shutil.rmtree(tmp_path / "home" / "lake" / "readings")
    with pytest.raises(ConfigError, match="no lake"):
        verify("r1")
    (run_folder("r1") / "ledger.parquet").unlink()
    with pytest.raises(ConfigError, match="no ledger"):
        verify("r1")
    assert CliRunner().invoke(app, ["verify", "--run", "r2"]).exit_code == 2


def test_the_command_says_by_its_exit_code_and_in_json_what_it_found(lake: Callable[[str], None]) -> None:
    lake("clean")
    good = CliRunner().invoke(app, ["verify", "--run", "r1", "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["is_balanced"] is True
    meter = change("readings", (pl.col("meter_id") == "m0000007") & (pl.col("seq") == 33))
    bad = CliRunner().invoke(app, ["verify", "--run", "r1", "--json"])
    assert bad.exit_code == 1
    report = json.loads(bad.stdout)
    assert report["totals"]["lost"] == 1
    assert any(row["meter_id"] == meter and "seq 33" in row["finding"] for row in report["findings"])
    assert {row["reason"]: row["recall"] for row in json.loads(good.stdout)["scores"]} == {
        "power_failure": 1, "tamper_detect": 1,
    }  # fmt: skip
    text = CliRunner().invoke(app, ["verify", "--run", "r1"])
    assert text.exit_code == 1
    assert f"{meter}: consumption_deltas" in text.stdout
    assert "1 of 144 lost: seq 33" in text.stdout


def test_a_run_that_the_jobs_have_not_taken_yet_is_not_finished_and_has_no_sums(lake: Callable[[str], None]) -> None:
    lake("clean")
    accounting = pl.read_parquet(table("accounting"))
    steps = (pl.col("stage") == "consumption_deltas") & (pl.col("received") > 0)
    accounting.with_columns(received=pl.col("received") - pl.when(steps).then(1).otherwise(0)).write_parquet(
        table("accounting")
    )
    ledger = json.loads((run_folder("r1") / "run.json").read_text())
    sent = ledger["readings"] + ledger["events"]
    received = accounting.filter(steps & (pl.col("run_id") == "r1"))
    behind = f"consumption_deltas has received {sent - len(received):,} of {sent:,} records"
    early = CliRunner().invoke(app, ["verify", "--run", "r1", "--wait", "0.1"])
    assert early.exit_code == 1
    assert early.stdout.splitlines()[0] == f"✗ not finished yet: {behind}"
    assert "redelivered" not in early.stdout
    assert verify("r1").as_json(1)["unfinished"] == [behind]
    accounting.write_parquet(table("accounting"))
    done = CliRunner().invoke(app, ["verify", "--run", "r1", "--wait", "60"])
    assert (done.exit_code, "not finished" in done.stdout) == (0, False)
