"""Verify, each over a lake of its own: a run that was too slow, one that was stopped, an engine that is wrong."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest

from metering.energy import delta_engine, walk
from replay.dirt.entries import Entry
from replay.pace import Pace
from replay.verify import verify
from schemas.closed_lists import FaultKind
from tests.run_lake import DIRT, METERS, chain, change, low, named
from tests.unit.test_run import Hindered, Kept
from tests.wire import small_tape


class Interrupted(Kept):
    """A sink during which somebody presses Ctrl-C."""

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        super().send(kind, meter_ids, payloads, encoding)
        if self.acknowledged > METERS * small_tape.READINGS / 2:
            os.kill(os.getpid(), signal.SIGINT)
            self.acknowledged = -(10**9)


def test_records_that_the_run_made_late_are_named_with_the_cause_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(tmp_path, 20, [], monkeypatch, Hindered(), speed=7_200.0, pace=Pace.OPEN)
    verdict = verify("r1")
    assert not verdict.is_balanced
    whole = verdict.findings.filter(pl.col("meter_id").is_null()).get_column("finding").to_list()
    assert len(whole) == 1
    assert "late and no fault explains it: the run kept its clock" in whole[0]
    assert "--pace steady" in whole[0]
    made, found = verdict.expected["windows"]
    assert made > found > 0
    assert verdict.totals["lost"] == 0


def test_an_interrupted_run_is_judged_by_what_it_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dirt = [each for each in DIRT if each.kind != FaultKind.LATE]
    dirt += [Entry(kind=FaultKind.LATE, meters=4, by="3h", at="4h")]  # due after the end, with a later record sent
    chain(tmp_path, 20, dirt, monkeypatch, Interrupted(), speed=40_000.0)
    verdict = verify("r1")
    assert not verdict.is_whole
    assert verdict.findings.rows() == []
    assert verdict.is_balanced
    assert verdict.kinds()["late"]["outcomes"] == {"not_sent": 4}
    assert "stopped before its end" in verdict.notes[0]
    meter = change("readings", (pl.col("meter_id") == "m0000009") & (pl.col("seq") == 3))
    assert named(verify("r1")) == {meter}


def test_an_engine_that_tells_wrongly_has_low_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes two intervals for one, never rolls over, and thinks nothing is too much for the fuse."""
    with monkeypatch.context() as wrong:
        wrong.setattr(delta_engine, "GAP_FACTOR", 2.5)
        wrong.setattr(walk, "GAP_FACTOR", 2.5)
        wrong.setattr(walk, "MIN_REGISTER_DIGITS", 12)
        wrong.setattr(walk.Limits, "step_wh", lambda *_: None)
        wrong.setattr(
            delta_engine, "with_limits",
            lambda rows, real=delta_engine.with_limits: real(rows).with_columns(max_w=pl.lit(None, pl.Int64)),
        )  # fmt: skip
        chain(tmp_path, 10, DIRT, monkeypatch)
    reasons = {reason for place, reason in low(verify("r1")) if place == "consumption_deltas"}
    assert {"gap", "rollover", "implausible"} <= reasons
