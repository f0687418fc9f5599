"""Simulated days: voltages are pandapower's, sums exact, the truth is what was read, the same seed the same bytes."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from replay.grid import (
    CONNECTION_OHM,
    HOME_KWH,
    NOMINAL_V,
    Customer,
    Grid,
    Supply,
    _quiet,
    _supply,
    flow,
    profile_grid,
    profile_rows,
    simbench_codes,
    simbench_grid,
)
from replay.simulate import CVR_EXPONENTS, Simulation, meters_of, registers, simulate, tap_changes
from replay.simulate.power import Outage, TapChange, course, drift, switched, switching
from replay.statistics import TARGETS, is_in_range, statistics
from replay.tape import read_tape, write_tape
from schemas.errors import ConfigError
from schemas.topics import METER_ID

BEGIN = datetime(2016, 6, 14, 22, tzinfo=UTC)


def small_grid(feeders: str = "AAAAABBBBB", hours: int = 24, open_v: float = 236.0) -> Grid:
    """Ten customers on two feeders, the last two with three phases, the last one with panels."""
    count, points = len(feeders), hours * 4 + 1
    customers = [
        Customer(f"B{number}", number >= count - 2, 4000, 6000.0 * (number == count - 1), 3000, f"T-{name}")
        for number, name in enumerate(feeders)
    ]
    load_w = np.tile(np.linspace(200, 900, points), (count, 1))
    made_w = np.zeros((count, points))
    made_w[-1] = 5000 * np.maximum(0, np.sin(np.linspace(-0.5, 1.5, points) * np.pi))
    ohm = np.full((count, count), 0.05 + 0.02j) + np.eye(count) * (0.05 + 0j)
    supplies = {step: Supply(np.full(count, open_v * (1 + 0.025 * step), complex), ohm, ohm) for step in (-1, 0, 1)}
    return Grid("simbench", "small", customers, "T", BEGIN, load_w, load_w * 0.2, made_w, 20_000.0, supplies, 900)


def rows_of(fleet: Simulation) -> pd.DataFrame:
    frame: pd.DataFrame = fleet.readings.to_pandas()
    return frame


def written_bytes(folder: Path, fleet: Simulation) -> dict[str, bytes]:
    write_tape(
        folder, readings=fleet.readings, events=fleet.events, registry=fleet.registry, format="simbench", source="x",
        time_zone="Europe/Berlin", rows_in=len(fleet.readings), defects={}, interval_s=300, truth=fleet.truth,
    )  # fmt: skip
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


@pytest.fixture(scope="module")
def rural() -> Grid:
    """A day of SimBench's smallest grid."""
    return simbench_grid("1-LV-rural1--0-sw", profile_rows(date(2016, 6, 15)), (-1, 0))


@pytest.fixture(scope="module")
def small() -> Simulation:
    """The small grid's meters by the minute."""
    return meters_of(small_grid(), step_s=60)


@pytest.fixture(scope="module")
def net() -> Iterator[Any]:
    """A transformer, two feeders, three loads, as pandapower has them."""
    with _quiet():
        import pandapower as pp

        net = pp.create_empty_network()
        medium, busbar, *nodes = [pp.create_bus(net, kv) for kv in (20, 0.4, 0.4, 0.4, 0.4)]
        pp.create_ext_grid(net, medium, vm_pu=1.025, s_sc_max_mva=1e9, rx_max=0.1, r0x0_max=0.1, x0x_max=1.0)
        pp.create_transformer_from_parameters(
            net, medium, busbar, 0.4, 20, 0.4, vkr_percent=1.2, vk_percent=6, pfe_kw=0, i0_percent=0, shift_degree=150,
            tap_side="hv", tap_pos=-1, tap_neutral=0, tap_min=-2, tap_max=2, tap_step_percent=2.5,
            tap_changer_type="Ratio", vector_group="Dyn", vk0_percent=6, vkr0_percent=1.2, mag0_percent=1e6, mag0_rx=0,
            si0_hv_partial=0.9, name="T",
        )  # fmt: skip
        for begin, end, length_km in ((busbar, nodes[0], 0.2), (nodes[0], nodes[1], 0.15), (busbar, nodes[2], 0.3)):
            pp.create_line_from_parameters(
                net, begin, end, length_km, r_ohm_per_km=0.2067, x_ohm_per_km=0.0804, c_nf_per_km=0, max_i_ka=0.27,
                r0_ohm_per_km=4 * 0.2067, x0_ohm_per_km=4 * 0.0804, c0_nf_per_km=0,
            )  # fmt: skip
        for node, p_mw in zip(nodes, (0.012, 0.009, -0.015), strict=True):
            pp.create_load(net, node, p_mw, p_mw * 0.3)
        yield net


def supply_without_connections(net: Any, step: int = 0) -> Supply:
    """The grid up to its nodes, as pandapower knows it."""
    with _quiet():
        supply = _supply(net, step)
    connection = np.eye(3) * CONNECTION_OHM
    return Supply(supply.open_v, supply.phase_ohm - connection, supply.neutral_ohm - connection)


@pytest.mark.parametrize("step", [0, 1, -2])
def test_the_flow_of_balanced_loads_has_pandapowers_voltages_at_every_tap(net: Any, step: int) -> None:
    import pandapower

    supply = supply_without_connections(net, step)
    load_va = (net.load.p_mw + 1j * net.load.q_mvar).to_numpy()[:, None] * 1e6
    volts, load_w = flow(supply, np.full((3, 3), 1 / 3), load_va, np.zeros((3, 1)), np.zeros(3), np.zeros(1))
    stands = net.trafo.tap_pos.iloc[0]
    with _quiet():
        net.trafo["tap_pos"] = stands - step
        pandapower.runpp(net, numba=False, tolerance_mva=1e-10)
        net.trafo["tap_pos"] = stands
    expected = net.res_bus.vm_pu.loc[net.load.bus].to_numpy() * 400 / np.sqrt(3)
    assert np.abs(volts[:, :, 0] - expected).max() < 1e-3
    assert load_w[:, 0] == pytest.approx(net.load.p_mw * 1e6)


def test_the_flow_of_single_phase_loads_has_the_voltages_of_pandapowers_three_phase_flow(net: Any) -> None:
    import pandapower

    supply = supply_without_connections(net)
    load_va = (net.load.p_mw + 1j * net.load.q_mvar).to_numpy()[:, None] * 1e6
    volts, _ = flow(supply, np.eye(3), load_va, np.zeros((3, 1)), np.zeros(3), np.zeros(1))
    with _quiet():
        for number, load in net.load.iterrows():
            phase = "abc"[number]
            power = {f"p_{phase}_mw": load.p_mw, f"q_{phase}_mvar": load.q_mvar}
            pandapower.create_asymmetric_load(net, load.bus, **power)
        net.load["in_service"] = False
        pandapower.runpp_3ph(net, numba=False)
        net.load["in_service"] = True
        net.asymmetric_load["in_service"] = False
    expected = net.res_bus_3ph.loc[net.load.bus, ["vm_a_pu", "vm_b_pu", "vm_c_pu"]].to_numpy().T * 400 / np.sqrt(3)
    assert np.abs(expected - expected.mean()).max() > 5
    assert np.abs(volts[:, :, 0] - expected).max() < 0.1


def test_a_load_follows_the_voltage_by_its_exponent_and_panels_do_not() -> None:
    hardly_ohm = np.diag(np.full(2, 1e-9 + 0j))
    supply = Supply(np.full(2, 1.05 * NOMINAL_V, complex), hardly_ohm, hardly_ohm)
    share, load_va = np.array([[1.0, 0], [0, 1], [0, 0]]), np.full((2, 1), 1000 + 0j)
    _, load_w = flow(supply, share, load_va, np.zeros((2, 1)), np.array([0.4, 2.0]), np.zeros(1))
    assert load_w[:, 0] == pytest.approx([1000 * 1.05**0.4, 1000 * 1.05**2])


def test_a_load_that_no_grid_can_carry_is_told() -> None:
    supply = Supply(np.full(1, NOMINAL_V, complex), np.full((1, 1), 1 + 0j), np.full((1, 1), 1 + 0j))
    with pytest.raises(ConfigError, match="more load than the grid can carry"):
        flow(supply, np.ones((3, 1)), np.full((1, 1), 1e6 + 0j), np.zeros((1, 1)), np.zeros(1), np.zeros(1))


def test_a_grid_of_simbench_has_its_customers_panels_feeders_and_taps(rural: Grid) -> None:
    assert len(simbench_codes()) == 36
    assert (len(rural.customers), sum(one.pv_w > 0 for one in rural.customers)) == (13, 4)
    assert rural.load_w.shape == rural.made_w.shape == (13, 97)
    assert len({one.feeder_id for one in rural.customers}) > 1
    up, down = (np.abs(rural.supplies[step].open_v).mean() for step in (0, -1))
    assert up / down == pytest.approx(1.025, abs=1e-3)
    fleet = meters_of(rural, step_s=900)
    assert all(METER_ID.fullmatch(name) for name in fleet.registry["meter_id"].to_pylist())
    topology = fleet.truth["topology"].to_pandas()
    assert topology.cvr_exponent.between(*CVR_EXPONENTS).all()
    assert (topology.phase_ohm > topology.neutral_ohm).all() and topology.neutral_ohm.nunique() == 13
    assert topology.set_index("meter_id").phase.str.count("L").to_dict() == {
        row["meter_id"]: row["phases"].count("L") for row in fleet.registry.to_pylist()
    }


def test_a_tap_step_lowers_voltage_and_energy_by_the_mean_exponent_of_the_homes(rural: Grid) -> None:
    rural = replace(rural, made_w=np.zeros_like(rural.made_w))
    kept, lowered = (
        rows_of(meters_of(rural, step_s=300, changes=changes)).groupby("meter_id")
        for changes in ((), [TapChange(rural.begin, -1)])
    )
    wh, less_wh = ((one.import_t1_wh.last() - one.import_t1_wh.first()) for one in (kept, lowered))
    volts, less_v = (one.voltage_l1_mv.mean() for one in (kept, lowered))
    measured = (less_wh / wh - 1) / (less_v / volts - 1)
    true = meters_of(rural, step_s=900).truth["topology"].to_pandas().set_index("meter_id").cvr_exponent
    assert (less_v / volts).between(0.96, 0.98).all()
    assert measured[wh > 2000].to_numpy() == pytest.approx(true[wh > 2000].to_numpy(), abs=0.1)
    pooled = (less_wh.sum() / wh.sum() - 1) / ((less_v / volts - 1) * wh).sum() * wh.sum()
    assert pooled == pytest.approx((true * wh).sum() / wh.sum(), abs=0.03)


def test_a_tap_change_moves_the_voltage_from_its_minute_on(small: Simulation) -> None:
    at = BEGIN + timedelta(hours=10, minutes=30)
    fleet = meters_of(small_grid(), step_s=60, changes=[TapChange(at, -1)])
    before, after = (
        fleet.readings.filter(pc.equal(fleet.readings["meter_id"], "simbench-0001")).to_pandas(),
        small.readings.filter(pc.equal(small.readings["meter_id"], "simbench-0001")).to_pandas(),
    )
    rows = before.merge(after, on="observed_at")
    change = rows.voltage_l1_mv_x / rows.voltage_l1_mv_y - 1
    assert change[rows.observed_at < at].abs().max() == 0
    assert change[rows.observed_at >= at].mean() == pytest.approx(-0.025, abs=0.002)
    assert fleet.truth["tap_changes"].to_pylist()[1]["at"] == at


def test_the_truth_is_what_the_registers_were_rounded_from(small: Simulation) -> None:
    true = small.truth["true_readings"].to_pandas()
    read = rows_of(small).merge(true.assign(meter_id=true.meter_id.astype(str)), on=["meter_id", "observed_at"])
    assert len(read) == len(small.readings) < len(true)
    for way in ("import", "export"):
        assert (read[f"{way}_t1_wh"] - read[f"{way}_wh"]).abs().max() <= 0.5
    assert (read.voltage_l1_mv / 1000 - read.voltage_l1_v).abs().max() < 0.001
    assert (read.import_w - read.export_w - read.power_w).abs().max() <= 0.5
    off = true.groupby("meter_id", observed=True).voltage_l1_v.agg(lambda volts: (volts == 0).sum())
    assert off.sum() == len(true) - len(read)


def test_the_sum_of_power_by_the_minute_is_the_register(small: Simulation) -> None:
    for _, own in rows_of(small).groupby("meter_id"):
        whole = own.iloc[:-1][own.observed_at.diff().shift(-1).iloc[:-1] == pd.Timedelta(minutes=1)]
        rises = own.import_t1_wh.diff().shift(-1).loc[whole.index]
        assert rises.sum() == pytest.approx(whole.import_w.sum() / 60, abs=whole.shape[0] * 0.01 + 2)


def test_switching_keeps_the_energy_of_every_quarter_hour() -> None:
    generator = np.random.default_rng(1)
    straight = generator.uniform(0, 1000, (5, 720))
    factor = switching(generator, 5, 720)
    result = switched(straight, factor, 90)
    quarters = [power.reshape(5, 8, 90).sum(axis=2) for power in (straight, result)]
    assert quarters[0] == pytest.approx(quarters[1])
    assert np.corrcoef(straight.ravel(), result.ravel())[0, 1] < 0.95
    assert (switched(np.zeros((5, 720)), factor, 90) == 0).all()


@pytest.mark.parametrize("step_s", [10, 60])
def test_drift_has_the_deviation_and_the_memory_it_is_asked_for(step_s: int) -> None:
    noise = drift(np.random.default_rng(3), 100_000, step_s=step_s, sd=1.3, time_s=500)
    assert noise.std() == pytest.approx(1.3, rel=0.08)
    assert np.corrcoef(noise[1:], noise[:-1])[0, 1] == pytest.approx(np.exp(-step_s / 500), rel=0.02)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    grid = small_grid(hours=6)
    once, again, other = (
        written_bytes(tmp_path / name, meters_of(grid, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert once == again
    assert once["readings.parquet"] != other["readings.parquet"]
    assert {f"truth/{name}.parquet" for name in ("topology", "true_readings", "tap_changes", "outages")} < set(once)
    assert len(read_tape(tmp_path / "a").readings) == pq.read_metadata(tmp_path / "a" / "readings.parquet").num_rows


def test_readings_inside_a_power_failure_are_missing_and_its_counters_rise_after_it(small: Simulation) -> None:
    frame, events = rows_of(small), small.events.to_pandas()
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
    assert sorted((one["end"] - one["begin"]).seconds // 60 for one in small.truth["outages"].to_pylist()) == [3, 20]
    long = frame.groupby("meter_id").long_power_failure_count.agg(lambda counts: counts.iloc[-1] - counts.iloc[0])
    assert long.sum() == lengths.count(20)


def test_a_feeder_that_is_off_loads_the_grid_no_more() -> None:
    grid = small_grid(hours=2)
    heavy = replace(grid, load_w=np.where(np.arange(10)[:, None] >= 5, 2000.0, grid.load_w), made_w=grid.made_w * 0)
    outages = [Outage("T-B", BEGIN + timedelta(minutes=30), BEGIN + timedelta(minutes=60))]
    share, exponent = np.full((3, 10), 1 / 3), np.zeros(10)
    lived, failed = (course(heavy, share, exponent, off, [], np.random.default_rng(1), 60) for off in ([], outages))
    risen = (failed.volts - lived.volts)[0, 0]
    assert risen[30:60].min() > 0.5 and abs(risen[:30]).max() == abs(risen[60:]).max() == 0
    assert (failed.volts[:, 5:, 30:60] == 0).all() and (failed.net_w[5:, 30:60] == 0).all()
    assert not failed.is_alive[5:, 30:60].any()


def test_the_step_of_the_readings_changes_what_is_read_and_hardly_what_is() -> None:
    last = [
        rows_of(meters_of(small_grid(hours=2), step_s=step))
        .groupby("meter_id")[["import_t1_wh", "export_t1_wh"]]
        .last()
        for step in (60, 300, 900, 10, 4)
    ]
    assert last[0].equals(last[1]) and last[1].equals(last[2])
    assert (last[0] - last[3]).abs().max().max() <= 5
    assert (last[3] - last[4]).abs().max().max() <= 2


def test_a_single_phase_meter_calls_its_phase_l1_and_knows_no_other(small: Simulation) -> None:
    phases = small.registry.to_pandas().set_index("meter_id").phases
    for meter_id, own in rows_of(small).groupby("meter_id"):
        assert own.voltage_l1_mv.notna().all()
        three = phases[meter_id] == "L1,L2,L3"
        assert own.voltage_l2_mv.notna().all() == own.voltage_l3_mv.notna().all() == three
        assert three or own.voltage_l2_mv.isna().all()
    assert set(phases) == {"L1", "L1,L2,L3"}


def test_a_voltage_below_the_limit_gives_a_caution_and_its_end() -> None:
    low = replace(
        small_grid(hours=3), supplies={0: small_grid(open_v=236).supplies[0], -4: small_grid(open_v=190).supplies[0]}
    )
    changes = [TapChange(BEGIN + timedelta(hours=1), -4), TapChange(BEGIN + timedelta(hours=2), 0)]
    events = meters_of(low, changes=changes).events.to_pandas()
    cautions = events[events.dialect == "itron"].sort_values("observed_at").groupby("meter_id").code.agg(list)
    assert len(cautions) == 10
    assert all(codes == ["ME16", "ME17"] for codes in cautions)


def test_a_simulated_day_lies_in_every_range_of_real_homes(rural: Grid, tmp_path: Path) -> None:
    fleet = meters_of(rural, step_s=60)
    written_bytes(tmp_path / "day", fleet)
    found = statistics(read_tape(tmp_path / "day"))
    figures = {name: found.realism[name] for name in TARGETS}
    assert {name: one for name, one in figures.items() if one is None or not is_in_range(name, one)} == {}
    assert found.power_to_register_pct is not None and abs(found.power_to_register_pct.median) < 0.1


def test_no_customer_passes_its_fuse(rural: Grid) -> None:
    fleet = meters_of(rural, step_s=60)
    registry = fleet.registry.to_pandas().set_index("meter_id")
    limit_w = registry.fuse_a * registry.phases.str.split(",").str.len() * NOMINAL_V
    step = rows_of(fleet).groupby("meter_id")
    assert (step.import_w.max() < limit_w).all() and (step.export_w.max() < limit_w).all()


def test_the_events_of_a_day_are_the_ones_a_fleet_says_and_of_two_days_twice_as_many() -> None:
    day, two = (meters_of(small_grid(hours=hours), step_s=900).events.to_pandas() for hours in (24, 48))
    assert {"AE1", "AE2", "AE7", "AE20", "AE44", "AE47", "A513"} == set(day.code)
    assert 15 <= (day.code == "AE7").sum() <= 20 < (two.code == "AE7").sum()
    assert set(day.dialect_version) == {"*"}
    assert (day.code == "AE1").sum() == (day.code == "AE2").sum() == 10


def test_registers_keep_what_is_rounded_off_in_the_sum() -> None:
    sums = np.cumsum(np.full((1, 1000), 0.3), axis=1)
    wh = registers(sums, np.array([100]))
    assert wh[0, -1] == 400
    assert set(np.diff(wh[0])) == {0, 1}


def test_homes_without_a_grid_follow_the_standard_profile_of_households() -> None:
    rows = profile_rows(date(2016, 1, 13))
    grid = profile_grid(100, rows, seed=1)
    kwh = [home.annual_kwh for home in grid.customers]
    assert np.median(kwh) == pytest.approx(HOME_KWH, rel=0.2)
    assert grid.load_w.sum(axis=0)[76] > 1.5 * grid.load_w.sum(axis=0)[12]
    assert np.ptp(grid.load_w / np.array(kwh)[:, None], axis=0).max() < 1e-12
    fleet = meters_of(grid, step_s=900)
    frame = rows_of(fleet)
    used = frame.groupby("meter_id").import_t1_wh.agg(lambda wh: wh.iloc[-1] - wh.iloc[0])
    assert used.sum() == pytest.approx(grid.load_w[:, :-1].sum() / 4, rel=0.06)
    assert set(frame.dialect) == {"demandlib"}
    assert frame.voltage_l1_mv.notna().all()


def test_a_tap_time_is_of_every_day_or_of_one_day_which_goes_first() -> None:
    wishes = {"10:00": -1, "2016-06-16T10:00": 0}
    changes = tap_changes(wishes, date(2016, 6, 15), 3)
    assert [change.steps for change in changes] == [-1, 0, -1]
    assert changes[0].at == datetime(2016, 6, 15, 8, tzinfo=UTC)
    for wrong, message in (("noon", "HH:MM"), ("2016-07-01T10:00", "outside")):
        with pytest.raises(ConfigError, match=message):
            tap_changes({wrong: 1}, date(2016, 6, 15), 3)


def test_what_cannot_be_simulated_is_the_operators_to_mend(tmp_path: Path, net: Any) -> None:
    with pytest.raises(ConfigError, match=r"no low-voltage grid nowhere .* 1-LV-urban6--2-no_sw"):
        simulate(tmp_path / "tape", grid="nowhere")
    with pytest.raises(ConfigError, match="2017-06-15 is not wholly in the profiles' year"):
        simulate(tmp_path / "tape", day=date(2017, 6, 15))
    with pytest.raises(ConfigError, match="2 days from 2016-12-30 are not wholly"):
        simulate(tmp_path / "tape", day=date(2016, 12, 30), days=2)
    with pytest.raises(ConfigError, match="does not divide an hour"):
        simulate(tmp_path / "tape", step_s=7)
    with pytest.raises(ConfigError, match="no transformer whose tap"):
        simulate(tmp_path / "tape", homes=3, taps={"10:00": 1})
    with pytest.raises(ConfigError, match=r"no tap step \+2: -3 to \+1 of 2.5 %"):
        supply_without_connections(net, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("day", "quarters"), [((2016, 3, 27), 92), ((2016, 6, 15), 96), ((2016, 10, 30), 100)])
def test_a_local_day_takes_as_many_quarter_hours_of_the_profile_as_it_has(
    day: tuple[int, int, int], quarters: int
) -> None:
    rows = profile_rows(date(*day))
    assert len(rows) == quarters + 1
    assert rows.start == profile_rows(date(*day) - timedelta(days=1))[-1]


def test_readings_carry_nothing_that_a_run_stamps(small: Simulation) -> None:
    assert not {"sent_at", "received_at", "run_id", "seq"} & set(small.readings.schema.names)
