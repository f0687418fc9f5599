"""How each meter plays its log, drawn by seed: from which week, at which scale, with which wave and phase."""

import math
from dataclasses import dataclass

import numpy as np

from replay.arrays import SECOND, Floats, Integers

DAY, WEEK = 86_400 * SECOND, 7 * 86_400 * SECOND
SCALES = (0.7, 1.3)  # homes of one grid differ by more; enough that no two copies are alike
START_WH = 20_000_000  # a meter some years old
SHIFT_MV = 800  # two neighbouring grids of one kind
WAVE = 0.3  # how much a home's use is bent at most; below 1, or a register could step back
WAVE_WH = (400.0, 4_000.0)  # length of the wave: some hours of a home's use


@dataclass(frozen=True)
class Plan:
    """What each meter plays: arrays of one entry a meter.

    Attributes:
        log: number of its log.
        week: microseconds of the log that it begins at.
        scale: factor on energy and power.
        wave: how much its use is bent, 0 to `WAVE`.
        wave_per_wh: angle per Wh of the wave along the register.
        angle: where on the wave it begins.
        start_wh: its registers' first value, if it is a copy.
        shift_mv: on its voltages.
        phase: microseconds after the log's time that it reports.
    """

    log: Integers
    week: Integers
    scale: Floats
    wave: Floats
    wave_per_wh: Floats
    angle: Floats
    start_wh: Integers
    shift_mv: Integers
    phase: Integers


def planned(count: int, logs: int, seed: int, weeks: int, interval: int, own_clock: bool) -> Plan:
    """The plan of a fleet.

    Each attribute has a generator of its own: a meter's plan does not depend on how many come after it.

    Args:
        count: how many meters.
        logs: how many logs the tape has.
        seed: the same gives the same plan.
        weeks: whole weeks of the log that a copy may begin at.
        interval: microseconds over which the meters' phases are spread; 0 for none.
        own_clock: the log as it is.
    """
    random = [np.random.default_rng(each) for each in np.random.SeedSequence(seed).spawn(8)]
    number = np.arange(count)
    is_copy = (number >= logs) & (not own_clock)
    week = random[0].integers(0, weeks, count) * WEEK
    scale = np.round(random[1].uniform(*SCALES, count), 4)
    wave = np.round(random[2].uniform(0, WAVE, count), 4)
    wave_wh = random[3].uniform(math.log(WAVE_WH[0]), math.log(WAVE_WH[1]), count)
    angle = random[4].uniform(0, 2 * math.pi, count)
    return Plan(
        log=number % logs,
        week=np.where(is_copy, week, 0),
        scale=np.where(is_copy, scale, 1.0),
        wave=np.where(is_copy, wave, 0.0),
        wave_per_wh=np.asarray(2 * math.pi / np.round(np.exp(wave_wh), 1), np.float64),
        angle=np.round(angle, 6),
        start_wh=random[5].integers(0, START_WH, count),
        shift_mv=np.where(is_copy, random[6].integers(-SHIFT_MV, SHIFT_MV + 1, count), 0),
        phase=random[7].integers(0, interval, count) if interval else np.zeros(count, np.int64),
    )
