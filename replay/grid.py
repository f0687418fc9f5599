"""Low-voltage grids: who hangs on them, what they use by quarter hour, and a four-wire power flow over many moments.

SimBench brings grids and profiles, pandapower their impedances, demandlib a profile where no grid is wanted. What comes
from whom: `docs/simulation.md`.
"""

import logging
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from replay.arrays import Floats
from replay.tape import NOMINAL_MV
from schemas.errors import ConfigError

Complexes = npt.NDArray[np.complex128]

PROFILE_STEP_S = 900
FIRST_DAY, LAST_DAY = date(2016, 1, 1), date(2016, 12, 30)
PROFILE_BEGIN = datetime(2015, 12, 31, 23, tzinfo=UTC)
"""Row 0 of SimBench's year, 2016-01-01 00:00 in Germany; the rows go on evenly over both clock changes."""
TIME_ZONE = "Europe/Berlin"
NOMINAL_V = NOMINAL_MV / 1000
SINGLE_PHASE_LIMIT_VA = 4600
"""What may be connected to one phase in Germany (VDE-AR-N 4105: 4.6 kVA)."""
CONNECTION_OHM = 0.055 + 0.003j
"""From the grid's node to the meter, phase and neutral each: 30 m of 10 mm² copper at 1.83 Ω/km."""
REFERENCE_PHASE_OHM, REFERENCE_NEUTRAL_OHM = 0.24 + 0.15j, 0.16 + 0.10j
"""Reference impedance of a low-voltage supply for a home, IEC 60725."""
OPEN_V = 1.025 * 400 / math.sqrt(3)
"""Without load, where there is no grid: what SimBench's have at the middle tap."""
HOME_KWH, HOME_SPREAD = 2900, 0.5
"""Yearly use of a German home: median and standard deviation of its logarithm, so that the mean is about 3,300 kWh."""
TURN = np.exp(-2j * np.pi / 3 * np.arange(3))
TOLERANCE_V = 1e-4  # a tenth of what a meter's last digit shows
MAX_ROUNDS = 100


@dataclass(frozen=True)
class Customer:
    """One load of the grid, with the solar panels behind its connection.

    Attributes:
        bus: name of its node in the grid.
        three_phase: by its rating and `SINGLE_PHASE_LIMIT_VA`.
        rated_va: of the load or its panels, the larger.
        pv_w: rated power of its panels; 0 without.
        annual_kwh: use of the profile's year at nominal voltage.
        feeder_id: the feeder off the transformer's busbar that it hangs on.
    """

    bus: str
    three_phase: bool
    rated_va: float
    pv_w: float
    annual_kwh: float
    feeder_id: str


@dataclass(frozen=True)
class Supply:
    """The grid as n customers see it, at one tap of the transformer.

    Attributes:
        open_v: per customer, V between phase and neutral without load.
        phase_ohm: per pair of customers, drop of a phase at the one per ampere in that phase at the other.
        neutral_ohm: per pair, of the neutral.
    """

    open_v: Complexes
    phase_ohm: Complexes
    neutral_ohm: Complexes


@dataclass(frozen=True)
class Grid:
    """A grid and its profiles over a span of time; nothing in it is ours to choose by a seed, but demandlib's homes.

    Attributes:
        prefix: of meter ids; where all comes from.
        name: SimBench's code, or the profile.
        customers: in the grid's order of loads.
        transformer_id: the one that feeds them.
        begin: local midnight, UTC.
        load_w: per customer and quarter hour, the last one included, at nominal voltage.
        load_var: reactive power of the same.
        made_w: from its panels.
        peak_w: the year's largest sum of loads.
        supplies: by steps of the tap changer, 0 for where it stands; upwards is a higher voltage.
        even_s: the span over which the profile's energy is a home's own: switching shifts it only within.
    """

    prefix: str
    name: str
    customers: list[Customer]
    transformer_id: str
    begin: datetime
    load_w: Floats
    load_var: Floats
    made_w: Floats
    peak_w: float
    supplies: dict[int, Supply]
    even_s: int


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of pandas, no log of pandapower: they are about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def profile_rows(day: date, days: int = 1) -> range:
    """Quarter hours of local days since the profiles' begin, first and last midnight included.

    A local day has 92, 96 or 100 of them.

    Raises:
        ConfigError: the days are not wholly in SimBench's year.
    """
    last = day + timedelta(days=days - 1)
    if days < 1 or day < FIRST_DAY or last > LAST_DAY:
        wanted = f"{day} is" if days == 1 else f"{days} days from {day} are"
        msg = f"{wanted} not wholly in the profiles' year: {FIRST_DAY} to {LAST_DAY} is"
        raise ConfigError(msg)
    zone = ZoneInfo(TIME_ZONE)
    midnights = [datetime.combine(one, time(), zone).astimezone(UTC) for one in (day, last + timedelta(days=1))]
    first, end = ((midnight - PROFILE_BEGIN) // timedelta(seconds=PROFILE_STEP_S) for midnight in midnights)
    return range(first, end + 1)


def _begin(rows: range) -> datetime:
    return PROFILE_BEGIN + timedelta(seconds=rows.start * PROFILE_STEP_S)


def simbench_codes() -> list[str]:
    """Codes of SimBench's low-voltage grids."""
    with _quiet():
        import simbench

        return [code for code in simbench.collect_all_simbench_codes() if "-LV-" in code]


def simbench_grid(code: str, rows: range, steps: Collection[int] = (0,)) -> Grid:
    """A grid of SimBench with its profiles, its batteries switched off.

    Args:
        code: such as `1-LV-rural3--1-sw`.
        rows: see `profile_rows`.
        steps: of the tap changer that will be used.

    Raises:
        ConfigError: no such grid, or its transformer has no such step.
    """
    if code not in (known := simbench_codes()):
        msg = f"no low-voltage grid {code} in SimBench, whose grids are {', '.join(known)}"
        raise ConfigError(msg)
    with _quiet():
        import simbench

        net = simbench.get_simbench_net(code)
        profiles = simbench.get_absolute_values(net, profiles_instead_of_study_cases=True)
        net.storage["in_service"] = False
        supplies = {step: _supply(net, step) for step in {0, *steps}}
        feeders = _feeders(net)
    loads_w, loads_var = (profiles["load", column].to_numpy().T * 1e6 for column in ("p_mw", "q_mvar"))
    panels_w = profiles["sgen", "p_mw"].to_numpy().T * 1e6
    made_w = np.zeros((len(net.load), len(rows)))
    pv_w = np.zeros(len(net.load))
    owner = {bus: index for index, bus in reversed(list(enumerate(net.load.bus)))}  # a bus's first load has its panels
    for number, (bus, size_mva) in enumerate(zip(net.sgen.bus, net.sgen.sn_mva, strict=True)):
        made_w[owner[bus]] += panels_w[number, rows.start : rows.stop]
        pv_w[owner[bus]] += size_mva * 1e6
    rated_va = np.maximum(net.load.sn_mva.to_numpy() * 1e6, pv_w)
    transformer = str(net.trafo.name.iloc[0])
    customers = [
        Customer(
            bus=str(net.bus.name.loc[bus]),
            three_phase=bool(rated_va[number] > SINGLE_PHASE_LIMIT_VA),
            rated_va=float(rated_va[number]),
            pv_w=float(pv_w[number]),
            annual_kwh=float(loads_w[number].sum()) * PROFILE_STEP_S / 3.6e6,
            feeder_id=f"{transformer}-{feeders[bus]}",
        )
        for number, bus in enumerate(net.load.bus)
    ]
    span = slice(rows.start, rows.stop)
    return Grid(
        "simbench", code, customers, transformer, _begin(rows), loads_w[:, span], loads_var[:, span], made_w,
        float(loads_w.sum(axis=0).max()), supplies, PROFILE_STEP_S,
    )  # fmt: skip


def _supply(net: Any, step: int) -> Supply:
    """From pandapower's node admittance matrix Y of the balanced grid: Z = Y⁻¹ without the slack, open_v = −Z Y₀ V₀.

    The neutral is that of a line as thick as its phases, earthed at the transformer: Z with the busbar held fast.
    """
    import pandapower

    trafo = net.trafo.iloc[0]
    position = trafo.tap_pos + (-step if trafo.tap_side == "hv" else step)
    if not trafo.tap_min <= position <= trafo.tap_max:
        down, up = sorted((trafo.tap_pos - trafo.tap_min, trafo.tap_pos - trafo.tap_max))
        msg = f"{trafo['name']} has no tap step {step:+d}: {down:+.0f} to {up:+.0f} of {trafo.tap_step_percent} %"
        raise ConfigError(msg)
    stands = trafo.tap_pos
    net.trafo["tap_pos"], net.trafo["tap_changer_type"] = position, "Ratio"  # without a type the position has no effect
    pandapower.runpp(net, numba=False)
    net.trafo["tap_pos"] = stands
    solved = net._ppc["internal"]
    admittance = solved["Ybus"].toarray()
    fed = np.setdiff1d(np.arange(len(admittance)), solved["ref"])
    impedance = np.linalg.inv(admittance[np.ix_(fed, fed)])
    open_pu = -impedance @ admittance[np.ix_(fed, solved["ref"])] @ solved["V"][solved["ref"]]
    lookup = net._pd2ppc_lookups["bus"]
    at = np.searchsorted(fed, lookup[net.load.bus])
    busbar = np.searchsorted(fed, lookup[trafo.lv_bus])
    beyond = impedance - np.outer(impedance[:, busbar], impedance[busbar]) / impedance[busbar, busbar]
    level_v = trafo.vn_lv_kv * 1000 / math.sqrt(3)
    ohm = 3 * level_v**2 / (net.sn_mva * 1e6)
    connection = np.eye(len(at)) * CONNECTION_OHM
    open_v = open_pu[at] * np.exp(-1j * np.angle(open_pu[busbar])) * level_v
    return Supply(open_v, impedance[np.ix_(at, at)] * ohm + connection, beyond[np.ix_(at, at)] * ohm + connection)


def _feeders(net: Any) -> dict[int, str]:
    """Bus → name of the line off the transformer's busbar behind which it lies; F00 is the busbar itself."""
    import networkx
    import pandapower.topology

    graph = pandapower.topology.create_nxgraph(net, respect_switches=True, include_trafos=False)
    busbar = net.trafo.lv_bus.iloc[0]
    paths = networkx.single_source_shortest_path(graph, busbar)
    names = {bus: f"F{number:02d}" for number, bus in enumerate(sorted(graph.neighbors(busbar)), 1)}
    return {bus: names[path[1]] if len(path) > 1 else "F00" for bus, path in paths.items()}


def profile_grid(homes: int, rows: range, seed: int) -> Grid:
    """Homes with demandlib's standard profile H0 of German households, without a grid.

    Each home hangs alone on the reference impedance of IEC 60725; what they have in common is the voltage before it.
    H0 is the mean of many homes, so a home's own energy is the profile's over a day, not over a quarter hour.

    Args:
        homes: how many.
        rows: see `profile_rows`.
        seed: draws the yearly use of each.

    Raises:
        ConfigError: no home.
    """
    if homes < 1:
        msg = f"{homes} homes: at least one is needed"
        raise ConfigError(msg)
    with _quiet():
        from demandlib.bdew import ElecSlp

        year = ElecSlp(FIRST_DAY.year).get_scaled_power_profiles({"h0_dyn": 1000})["h0_dyn"]
    zone = ZoneInfo(TIME_ZONE)
    quarters = [_begin(rows) + timedelta(seconds=number * PROFILE_STEP_S) for number in range(len(rows))]
    w_per_kwh = year.loc[[quarter.astimezone(zone).replace(tzinfo=None) for quarter in quarters]].to_numpy()
    kwh = HOME_KWH * np.random.default_rng([seed, homes]).lognormal(0, HOME_SPREAD, homes)
    load_w = kwh[:, None] * w_per_kwh
    alone = np.eye(homes, dtype=np.complex128)
    return Grid(
        "demandlib", "H0", [Customer("", False, SINGLE_PHASE_LIMIT_VA, 0.0, float(own), "H0-F01") for own in kwh], "H0",
        _begin(rows), load_w, np.zeros(load_w.shape), np.zeros(load_w.shape), float(year.max() * kwh.sum()),
        {0: Supply(np.full(homes, OPEN_V, np.complex128), alone * REFERENCE_PHASE_OHM, alone * REFERENCE_NEUTRAL_OHM)},
        86_400,
    )  # fmt: skip


def flow(
    supply: Supply,
    share: Floats,
    load_va: Complexes,
    made_w: Floats,
    exponent: Floats,
    level_v: Floats,
) -> tuple[Floats, Floats]:
    """Four-wire power flow of n customers at m moments, by repeated current injection.

    V_p = (E + ΔE) aᵖ − Z I_p − Z_N (I_1 + I_2 + I_3), I_p = conj(S_p / V_p), S_p = share_p (S₀ (|V_p| / Vn)ⁿ − P_made).

    Args:
        supply: E, Z and Z_N.
        share: per phase and customer, of its power on that phase.
        load_va: S₀ per customer and moment: load at nominal voltage.
        made_w: of its panels, whatever the voltage.
        exponent: n per customer: what a per cent of voltage changes its load by, in per cent.
        level_v: per moment, what the medium voltage lies above the grid's fixed source, at the low-voltage side.

    Returns:
        V per phase, customer and moment; W of load per customer and moment.

    Raises:
        ConfigError: no such flow: the load is more than the grid can carry.
    """
    source = (supply.open_v[:, None] + level_v) * TURN[:, None, None]
    volts = source
    for _ in range(MAX_ROUNDS):
        factor = share[:, :, None] * (np.abs(volts) / NOMINAL_V) ** exponent[:, None]
        current = np.conj((factor * load_va - share[:, :, None] * made_w) / volts)
        before, volts = volts, source - supply.phase_ohm @ current - supply.neutral_ohm @ current.sum(axis=0)
        change_v = np.abs(volts - before).max()
        if change_v < TOLERANCE_V:
            return np.abs(volts), (factor.sum(axis=0) * load_va.real)
    msg = f"the power flow found no voltages after {MAX_ROUNDS} rounds: more load than the grid can carry"
    raise ConfigError(msg)
