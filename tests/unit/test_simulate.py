"""A simulated day: the grid's own figures, exact sums, the same seed the same bytes."""

import math
from collections import Counter
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pyarrow.compute as pc
import pytest

from replay.simulate import (
    FUSE_A,
    NOMINAL_V,
    UNBALANCE_PER_OHM,
    Customer,
    SolvedDay,
    drift,
    meters_of,
    positive_energy,
    profile_rows,
    registers,
    simulate,
    solve,
    unbalance,
)
from replay.tape import read_tape, write_tape
from schemas.errors import ConfigError
from schemas.topics import METER_ID

BEGIN = datetime(2016, 6, 14, 22, tzinfo=UTC)


def small_day(net_w=None, bus_v=236.0, feeders="AAAAABBBBB"):
    """Ten customers on two feeders, the last two with three phases, the last one with panels."""
    count = len(feeders)
    customers = [Customer(number >= count - 2, number == count - 1, f"T-{name}") for number, name in enumerate(feeders)]
    power = np.tile(np.linspace(200, 900, 97), (count, 1)) if net_w is None else net_w
    power[-1] -= 5000 * np.maximum(0, np.sin(np.linspace(-0.5, 1.5, power.shape[1]) * math.pi))
    return SolvedDay(customers, "T", BEGIN, power, np.full(power.shape, bus_v), np.full((count, count), 0.05))


def rows_of(fleet):
    return fleet.readings.to_pandas()


def written_bytes(folder, fleet):
    write_tape(
        folder, readings=fleet.readings, events=fleet.events, registry=fleet.registry, format="simbench", source="x",
        time_zone="Europe/Berlin", rows_in=len(fleet.readings), defects={}, interval_s=300,
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """The default day, once: (solved day, progress calls, tape as read)."""
    calls = []
    folder = tmp_path_factory.mktemp("day") / "tape"
    solved = solve(progress=lambda done, total: calls.append((done, total)))
    fleet = meters_of(solved)
    written_bytes(folder, fleet)
    return solved, calls, read_tape(folder)


def test_a_whole_day_of_the_grid_has_its_customers_panels_and_moments(day):
    solved, calls, tape = day
    assert (len(solved.customers), sum(customer.has_pv for customer in solved.customers)) == (145, 25)
    assert calls == [(done, 97) for done in range(1, 98)]
    frame = tape.readings.to_pandas()
    assert frame.meter_id.nunique() == 145 and all(METER_ID.fullmatch(name) for name in frame.meter_id.unique())
    assert frame.observed_at.nunique() == 289
    assert (frame.observed_at.min(), frame.observed_at.max()) == (BEGIN, BEGIN + timedelta(days=1))
    assert frame.groupby("meter_id").size().max() == 289
    assert frame.observed_at.is_monotonic_increasing
    assert set(tape.registry["time_zone"].to_pylist()) == {"Europe/Berlin"}
    assert not frame.duplicated(["meter_id", "observed_at"]).any()


def test_the_days_voltages_look_like_a_real_log(day):
    solved, _, tape = day
    frame = tape.readings.to_pandas()
    volts = frame.pivot(index="observed_at", columns="meter_id", values="voltage_l1_mv") / 1000
    assert 207 < volts.min().min() < volts.max().max() < 253
    assert 0.75 < np.mean([volts[name].autocorr(1) for name in volts]) < 0.97
    assert 0.6 < np.mean([volts[name].autocorr(2) for name in volts]) < 0.9
    hours = volts.groupby(volts.index.floor("h"))
    assert 3 < (hours.max() - hours.min()).stack().median() < 12
    pairs = volts.corr().to_numpy()[np.triu_indices(145, 1)]
    assert np.median(pairs) > 0.9
    assert volts.round(3).nunique().min() > 250
    exported = np.maximum(-solved.net_w, 0).sum(axis=0)
    assert np.corrcoef(exported, solved.bus_v.mean(axis=0))[0, 1] > 0.4


def test_the_days_sum_of_deltas_is_the_integral_of_power_without_the_outages(day):
    solved, _, tape = day
    frame = tape.readings.to_pandas()
    minute = np.stack([np.interp(np.arange(0, 86401, 60), np.arange(97) * 900, row) for row in solved.net_w])
    off = np.zeros((145, 1440), bool)
    down = frame_of_events(tape, "AE1").groupby("meter_id").observed_at
    up = frame_of_events(tape, "AE2").groupby("meter_id").observed_at
    for meter_id, begin in down.min().items():
        first = (begin - BEGIN) // timedelta(minutes=1)
        off[int(meter_id[-4:]) - 1, first : (up.min()[meter_id] - BEGIN) // timedelta(minutes=1)] = True
    for register, sign in (("import", 1), ("export", -1)):
        wh = frame.groupby("meter_id")[f"{register}_t1_wh"].agg(["first", "last"])
        expected = np.where(off, 0, positive_energy(sign * minute, 60)).sum(axis=1)
        assert np.abs((wh["last"] - wh["first"]).to_numpy() - expected).max() <= 0.5 + 1e-6
        assert (frame.groupby("meter_id")[f"{register}_t1_wh"].diff().dropna() >= 0).all()


def frame_of_events(tape, code):
    events = tape.events.to_pandas()
    return events[events.code == code]


def test_no_customer_of_the_day_passes_its_fuse(day):
    solved, _, tape = day
    phases = tape.registry.to_pandas().set_index("meter_id").phases.str.split(",").str.len()
    assert set(phases) == {1, 3}
    limit_w = phases * FUSE_A * NOMINAL_V
    frame = tape.readings.to_pandas()
    step = frame.groupby("meter_id")
    for way in ("import", "export"):
        assert (step[f"{way}_w"].max() < limit_w).all()
        assert (step[f"{way}_t1_wh"].diff().groupby(frame.meter_id).max() < limit_w * 300 / 3600).all()


def test_the_days_events_are_the_ones_a_fleet_says(day):
    events = day[2].events.to_pandas()
    counted = Counter(zip(events.dialect, events.source_table, events.code, strict=True))
    assert counted["c12.19", "ST76", "AE1"] == counted["c12.19", "ST76", "AE2"] >= 10
    assert 200 < counted["c12.19", "ST76", "AE7"] <= 290
    assert counted["c12.19", "ST76", "AE20"] >= 20
    assert {("c12.19", "ST76", "AE44"), ("c12.19", "ST76", "AE47"), ("c12.19", "ST3", "A513")} < set(counted)
    assert events[events.code != "AE7"].shape[0] / 145 < 1
    assert set(events.dialect_version) == {"*"}
    bits = events[events.code == "A513"].sort_values("observed_at").groupby("meter_id").argument.agg("".join)
    assert set(bits) <= {"10", "1"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    solved = small_day()
    once, again, other = (
        written_bytes(tmp_path / name, meters_of(solved, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert once == again
    assert once["readings.parquet"] != other["readings.parquet"]


def test_readings_inside_a_power_failure_are_missing_and_its_counters_rise_after_it():
    fleet = meters_of(small_day(), step_s=60)
    frame, events = rows_of(fleet), fleet.events.to_pandas()
    power = events[events.code.isin(["AE1", "AE2"])]
    lengths = []
    for meter_id, own in power.groupby("meter_id"):
        mine = frame[frame.meter_id == meter_id].set_index("observed_at")
        for down, up in own.observed_at.to_numpy().reshape(-1, 2):
            inside = mine[(mine.index.to_numpy() > down) & (mine.index.to_numpy() < up - np.timedelta64(6, "s"))]
            assert inside.empty
            lengths.append(round((up - down) / np.timedelta64(60, "s")))
        rise = mine.power_failure_count.iloc[-1] - mine.power_failure_count.iloc[0]
        assert rise == len(own) / 2
        assert mine.import_t1_wh.is_monotonic_increasing
    assert set(lengths) == {3, 20}
    long = frame.groupby("meter_id").long_power_failure_count.agg(lambda counts: counts.iloc[-1] - counts.iloc[0])
    assert long.sum() == lengths.count(20)


def test_the_step_of_the_readings_does_not_change_the_sums():
    solved = small_day()
    last = [
        rows_of(meters_of(solved, step_s=step)).groupby("meter_id")[["import_t1_wh", "export_t1_wh"]].last()
        for step in (60, 300, 900)
    ]
    assert last[0].equals(last[1]) and last[1].equals(last[2])


def test_a_single_phase_meter_calls_its_phase_l1_and_knows_no_other():
    fleet = meters_of(small_day())
    frame = rows_of(fleet)
    registry = fleet.registry.to_pandas().set_index("meter_id")
    for meter_id, own in frame.groupby("meter_id"):
        assert own.voltage_l1_mv.notna().all()
        three = registry.phases[meter_id] == "L1,L2,L3"
        assert own.voltage_l2_mv.notna().all() == own.voltage_l3_mv.notna().all() == three
        assert three or own.voltage_l2_mv.isna().all()
    assert set(registry.phases) == {"L1", "L1,L2,L3"}


def test_a_voltage_below_the_limit_gives_one_caution_and_one_clear():
    solved = small_day(bus_v=236.0)
    solved.bus_v[:, 40:44] = 200.0
    events = meters_of(solved).events.to_pandas()
    low = events[events.dialect == "itron"]
    told = low.sort_values("observed_at").groupby("meter_id").code.agg(list)
    assert len(told) == 10
    assert all(codes == ["ME16", "ME17"] for codes in told)
    assert set(low.source_table) == {"MT76"}


def test_registers_keep_what_is_rounded_off_in_the_sum():
    energy = np.full((1, 1000), 0.3)
    wh = registers(energy, np.array([100]))
    assert wh[0, 0] == 100 and wh[0, -1] == 400
    assert set(np.diff(wh[0])) == {0, 1}


def test_the_energy_of_a_power_that_changes_sign_is_split_between_import_and_export():
    power = np.array([[300.0, -100.0, -100.0, 0.0, 200.0]])
    assert positive_energy(power, 3600)[0] == pytest.approx([112.5, 0, 0, 100])
    assert positive_energy(-power, 3600)[0] == pytest.approx([12.5, 100, 50, 0])


def test_unbalance_lowers_the_phase_that_carries_more_and_sums_to_zero_over_the_phases():
    net_w = np.array([[3000.0], [0.0], [9000.0]])
    terms = unbalance(net_w, np.array([1, 0, 2]), np.array([False, False, True]), np.full((3, 3), 0.1))
    assert terms[1, 0, 0] == pytest.approx(-UNBALANCE_PER_OHM / NOMINAL_V * 0.1 * 2000)
    assert terms[0, 0, 0] == terms[2, 0, 0] == pytest.approx(UNBALANCE_PER_OHM / NOMINAL_V * 0.1 * 1000)
    assert np.abs(terms.sum(axis=0)).max() < 1e-12


def test_unbalance_is_nothing_at_a_meter_that_shares_no_conductor():
    terms = unbalance(np.array([[5000.0], [0.0]]), np.array([0, 1]), np.array([False, False]), np.diag([0.1, 0.1]))
    assert np.abs(terms[:, 1]).max() == 0


@pytest.mark.parametrize("step_s", [60, 300])
def test_drift_has_the_deviation_and_the_memory_it_is_asked_for(step_s):
    noise = drift(np.random.default_rng(3), (400, 500), step_s=step_s, sd=1.3, time_s=1500)
    assert noise.std() == pytest.approx(1.3, rel=0.03)
    after = np.mean(noise[:, 1:] * noise[:, :-1]) / np.mean(noise**2)
    assert after == pytest.approx(math.exp(-step_s / 1500), rel=0.02)


def test_what_cannot_be_simulated_is_the_operators_to_mend(tmp_path):
    with pytest.raises(ConfigError, match="no low-voltage grid nowhere"):
        solve(grid="nowhere")
    with pytest.raises(ConfigError, match="2017-06-15 is not wholly in SimBench's year"):
        solve(day=date(2017, 6, 15))
    with pytest.raises(ConfigError, match="does not divide an hour"):
        simulate(tmp_path / "tape", step_s=7)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("day", "quarters"), [((2016, 3, 27), 92), ((2016, 6, 15), 96), ((2016, 10, 30), 100)])
def test_a_local_day_takes_as_many_quarter_hours_of_the_profile_as_it_has(day, quarters):
    rows = profile_rows(date(*day))
    assert len(rows) == quarters + 1
    assert rows.start == profile_rows(date(*day) - timedelta(days=1))[-1]


def test_readings_carry_nothing_that_a_run_stamps():
    table = meters_of(small_day()).readings
    assert not {"sent_at", "received_at", "run_id", "seq"} & set(table.schema.names)
    assert pc.all(pc.equal(table["dialect"], "simbench")).as_py()
