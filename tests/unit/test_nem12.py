"""NEM12 and NEM13, the Australian files: channels, days, what is refused with what hangs on it, market time."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from metering.energy.walk import Limits, walk
from replay.importers import import_log
from schemas.errors import BadLog
from tests.logs_by_hand import column, log, minutes_after, nem12, read


def day(date: int | str, *values: int | str, quality: str = "A") -> str:
    return f"300,{date},{','.join(map(str, values))},{quality},,,,"


def channel(suffix: str = "E1", minutes: int = 720, nmi: str = "NMI1") -> str:
    return f"200,{nmi},E1B1,1,{suffix},N1,SER1,kWh,{minutes},"


def test_nem12_channels_of_one_meter_meet_at_the_ends_of_their_intervals(tmp_path: Path) -> None:
    half, hour = ",".join(["0.5"] * 48), ",".join(["1000"] * 24)
    path = log(
        tmp_path / "log.csv",
        nem12(
            "200,NMI1,E1B1Q1,1,E1,N1,SER1,kwh,30,", f"300,20040201,{half},A,,,,", f"300,20040202,{half},V,,,,",
            "400,1,40,A,,", "400,41,47,S14,,", "400,48,48,E52,,",
            "200,NMI1,E1B1Q1,2,B1,N1,SER1,Wh,60,", f"300,20040201,{hour},F14,,,,",
            "200,NMI1,E1B1Q1,3,Q1,N1,SER1,kVArh,30,", f"300,20040201,{half},A,,,,",
        ),
    )  # fmt: skip
    imported = read(path, "nem12")
    assert (imported.rows_in, len(imported.readings)) == (96 + 24 + 48, 97)
    begin = datetime(2004, 1, 31, 14, tzinfo=UTC)
    assert minutes_after(imported, begin) == [30 * n for n in range(97)]
    assert column(imported, "import_t1_wh") == [500 * n for n in range(97)]
    assert column(imported, "export_t1_wh")[:6] == [0, None, 1000, None, 2000, None]
    assert imported.defects == {"other_quantity": 48, "substituted": 24 + 7, "estimated": 1}
    assert set(column(imported, "equipment_id")) == {"SER1"}


def test_a_channel_may_change_its_interval_length_and_its_days_may_come_in_any_order(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log.csv",
        nem12(channel(minutes=480), day(20240203, 4, 5, 6), channel(), day(20240202, 3, 3), day(20240201, 1, 2)),
    )
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [0, 1000, 3000, 6000, 9000, 13000, 18000, 24000]
    assert minutes_after(imported, datetime(2024, 1, 31, 14, tzinfo=UTC)) == [
        0, 720, 1440, 2160, 2880, 3360, 3840, 4320,
    ]  # fmt: skip


def test_intervals_without_a_value_or_of_quality_n_add_nothing_and_have_no_reading(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log.csv",
        nem12(
            channel(minutes=360), day(20240201, 1, "", 2, 3, quality="V"), "400,1,2,A,,", "400,3,3,N,,", "400,4,4,A,,"
        ),
    )
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [0, 1000, 4000]
    assert imported.defects["empty_fields"] == 2


def test_of_a_day_that_comes_again_the_newest_update_counts_wherever_it_stands(tmp_path: Path) -> None:
    old, new = "300,20240201,1,2,S,,,20240202000000,", "300,20240201,3,4,A,,,20240509000000,"
    for days in ([old, new], [new, old]):
        imported = read(log(tmp_path / "log.csv", nem12(channel(), *days, day(20240202, 1, 1))), "nem12")
        assert column(imported, "import_t1_wh") == [0, 3000, 7000, 8000, 9000]
        assert (imported.defects["superseded"], imported.defects["conflict"], imported.rows_in) == (2, 0, 6)


def test_a_file_whose_header_was_left_out_is_a_nem12_all_the_same(tmp_path: Path) -> None:
    whole = nem12(channel(), day(20240201, 1, 2))
    imported = read(log(tmp_path / "log.csv", whole.partition("\n")[2]), "nem12")
    assert column(imported, "import_t1_wh") == [0, 1000, 3000]
    with pytest.raises(BadLog, match=r"log.csv:1: the first record is 'meter,wh', expected 100,NEM12 or 100,NEM13"):
        read(log(tmp_path / "log.csv", "meter,wh\n1,2\n"), "nem12")


def test_a_day_that_comes_again_is_kept_as_duplicate_or_conflict_and_summed_once(tmp_path: Path) -> None:
    path = log(tmp_path / "log.csv", nem12(channel(), day(20240201, 1, 2), day(20240201, 1, 5), day(20240202, 1, 1)))
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [0, 1000, 1000, 3000, 6000, 4000, 5000]
    assert (imported.defects["duplicate"], imported.defects["conflict"]) == (1, 1)


@pytest.mark.parametrize(
    ("records", "line", "reason"),
    [
        ([day(20240201, 1, 2)], 2, "a day without a channel"),
        ([channel(minutes=7), day(20240201, 1, 2)], 2, "no interval length"),
        ([channel(minutes=0), day(20240201, 1, 2)], 2, "no interval length"),
        ([channel(nmi="N 1"), day(20240201, 1, 2)], 2, "no NMI"),
        ([channel(), day(20240201, 1, 2, quality="V"), "400,1,3,A,,"], 4, "no stretch of 2 intervals"),
        ([channel(), day(20240201, -1, 2)], 3, "field 3: '-1' is below 0, expected an energy"),
        ([channel(), day(20240201, 1, "x")], 3, "field 4: not a number: 'x'"),
        ([channel("").replace("E1B1", ""), day(20240201, 1, 2)], 2, "field 5: no NMI suffix of a channel in kWh"),
        ([channel().replace("SER1", '"S"1'), day(20240201, 1, 2)], 2, "a quotation mark that does not enclose"),
        ([channel(), day(20240201, 1, "1,5")], 3, "3 values, expected 2 values and a quality: .* 720 minutes"),
        ([channel(), day(20240201, 1)], 3, "1 values, expected 2 values"),
        ([channel(), "300,20240201,1"], 3, "1 fields after the date and no quality, expected 2 values"),
        ([channel(), day("20240231", 1, 2)], 3, "field 2: no day: '20240231', expected YYYYMMDD"),
        ([channel(), day(20240201, 1, "1.2.3")], 3, "field 4: not a number: '1.2.3'"),
        (["200,NMI1,E1"], 2, "record 200 of 3 fields is cut off"),
    ],
)
def test_a_nem12_record_that_does_not_follow_is_refused_with_what_hangs_on_it(
    tmp_path: Path, records: list[str], line: int, reason: str
) -> None:
    sound = [channel("B1", nmi="NMI2"), day(20240201, 1, 1)]
    path = log(tmp_path / "log.csv", nem12(*records, *sound))
    with pytest.raises(BadLog, match=rf"log.csv:{line}: .*{reason}"):
        read(path, "nem12")
    going = read(path, "nem12", keep_going=True)
    assert going.refused[0].startswith(f"{path}:{line}: ")
    assert [wh for wh in column(going, "export_t1_wh") if wh is not None] == [0, 1000, 2000]


def test_a_nem12_day_that_is_refused_counts_all_its_intervals(tmp_path: Path) -> None:
    path = log(
        tmp_path / "x.csv", nem12(channel(), day(20240201, 1, 1), day(20240202, 1, 2, quality=""), day(20240203, 1, 1))
    )
    going = read(path, "nem12", keep_going=True)
    assert (going.rows_in, going.defects["refused"]) == (6, 2)
    assert len(going.readings) == 5, "the begin, and four intervals"


@pytest.mark.parametrize(
    ("records", "refused"),
    [
        ([channel(nmi="N 1"), day(20240202, 1, "", 1, 1)], 1 + 4),  # its channel is unknown, its values are four
        ([channel(nmi="N 1"), day(20240202, 1, 1, quality="")], 1 + 2),
        ([channel(minutes=7), "300,20240202"], 1 + 1),
        ([channel(minutes=7), day(20240202, 1, 1), "400,1,1,A,,"], 1 + 2),
        (["400,1,3,A,,"], 1),
        (["250,1"], 1),
        (["777,1"], 1),
        ([day(20240202, "1e16", 1)], 2),
        ([day(20240202, "1e999999999", 1)], 2),
        ([day(99991231, 1, 1)], 2),
    ],
)
def test_what_a_nem12_file_is_refused_is_part_of_its_rows_in(tmp_path: Path, records: list[str], refused: int) -> None:
    path = log(tmp_path / "x.csv", nem12(channel(), day(20240201, 1, 1), *records))
    going = read(path, "nem12", keep_going=True)
    assert (going.rows_in, going.defects["refused"]) == (2 + refused, refused)
    assert column(going, "import_t1_wh") == [0, 1000, 2000]


def test_a_nem12_file_that_is_no_csv_is_refused_with_its_line(tmp_path: Path) -> None:
    path = log(tmp_path / "x.csv", nem12(channel(), day(20240201, 1, 1), '300,20240202,"' + "1," * 70_000))
    with pytest.raises(BadLog, match=r"x\.csv:4: field larger"):
        read(path, "nem12")
    going = read(path, "nem12", keep_going=True)
    assert (going.rows_in, going.defects["refused"]) == (3, 1)


def test_days_below_a_garbled_channel_are_nobodys(tmp_path: Path) -> None:
    """Else reactive energy would count as the channel's above it."""
    garbled = channel(suffix="Q1").replace("200,", "Z200,").replace("kWh", "kVArh")
    text = nem12(channel(), day(20240201, 1, 1), garbled, day(20240201, 7, 7))
    imported = read(log(tmp_path / "x.csv", text), "nem12", keep_going=True)
    assert (imported.rows_in, imported.defects["refused"], imported.defects["conflict"]) == (5, 3, 0)
    assert column(imported, "import_t1_wh") == [0, 1000, 2000]


def test_western_power_keeps_its_own_markets_time(tmp_path: Path) -> None:
    text = nem12(channel(), day(20240201, 1, 2)).replace("MDA1", "WPNTKS")
    imported = read(log(tmp_path / "log.csv", text), "nem12")
    assert (imported.time_zone, column(imported, "observed_at")[0]) == (
        "Australia/Perth",
        datetime(2024, 1, 31, 16, tzinfo=UTC),
    )
    assert read(tmp_path / "log.csv", "nem12", timezone="Australia/Sydney").time_zone == "Australia/Sydney"


def test_nem13_reads_are_registers_as_they_stand(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log.csv",
        "100,NEM13,200401101030,MDA1,Ret1\n"
        "250,NMI2,11,1,11,11,SER2,E,006342.8,20031005093055,A,,,007654.9,20040107100333,E64,,,1312.1,kWh,,,\n900\n",
    )
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [6_342_800, 7_654_900]
    assert column(imported, "observed_at")[0] == datetime(2003, 10, 4, 23, 30, 55, tzinfo=UTC)
    assert (imported.rows_in, imported.defects) == (1, {"estimated": 1})


@pytest.mark.parametrize(
    ("date", "defect"), [("20240407", "ambiguous_local_time"), ("20241006", "nonexistent_local_time")]
)
def test_a_nem12_file_in_a_zone_that_changes_its_clock_names_the_intervals_it_cannot_tell(
    tmp_path: Path, date: str, defect: str
) -> None:
    path = log(tmp_path / "log.csv", nem12(channel(minutes=60), day(date, *[1] * 24)))
    assert read(path, "nem12", timezone="Australia/Sydney").defects[defect] == 1
    assert not read(path, "nem12").defects, "market time has no summer time"


def test_boxes_under_one_nmi_have_registers_of_their_own_and_no_serial_of_what_is_summed(tmp_path: Path) -> None:
    second = channel("E2").replace("SER1", "SER2")
    path = log(tmp_path / "log.csv", nem12(channel(), day(20240201, 1, 2), second, day(20240201, 3, "")))
    imported = read(path, "nem12")
    assert (column(imported, "import_t1_wh"), column(imported, "import_t2_wh")) == ([0, 1000, 3000], [0, 3000, None])
    assert set(column(imported, "equipment_id")) == {None}
    alone = read(log(tmp_path / "one.csv", nem12(channel(), day(20240201, 1, 2))), "nem12")
    assert set(column(alone, "equipment_id")) == {"SER1"}


def nem13(*reads: tuple[str, str, int | str, int | str], quantity: int | str | None = None) -> str:
    """(suffix, serial, previous, current), kWh, of one quarter."""
    rows = []
    for suffix, serial, old, new in reads:
        used = int(new) - int(old) if quantity is None else quantity
        both = f"E,{old},20240101000000,A,,,{new},20240401000000,A,,,{used}"
        rows.append(f"250,NMI1,,1,{suffix},1,{serial},{both},KWH,,,")
    return "\n".join(["100,NEM13,202405010000,MDA1,Ret1", *rows, "900", ""])


def test_a_nem13s_suffixes_are_registers_whichever_box_has_them(tmp_path: Path) -> None:
    text = nem13(("11", "S1", 27_240, 28_220), ("41", "S1", 19_890, 20_580))
    imported = read(log(tmp_path / "log.csv", text), "nem12")
    assert column(imported, "import_t1_wh") == [27_240_000, 28_220_000]
    assert column(imported, "import_t2_wh") == [19_890_000, 20_580_000]
    assert imported.defects["conflict"] == 0
    exchanged = nem13(("11", "S1", 100, 200), ("11", "S2", 5, 60))
    registers = column(read(log(tmp_path / "exchanged.csv", exchanged), "nem12"), "import_t2_wh")
    assert set(registers) == {None}
    several = nem13(*[(suffix, "S", 1, 2) for suffix in ("11", "41", "61", "71", "81")])
    with pytest.raises(BadLog, match=r"log5.csv:6: field 5: '81' is one register more than 11, 41, 61, 71, and a "):
        read(log(tmp_path / "log5.csv", several), "nem12")


def test_a_suffix_with_energy_and_without_a_register_is_refused_and_one_without_energy_is_not(tmp_path: Path) -> None:
    energies = nem12(channel("E5"), day(20240201, 0, 2))
    with pytest.raises(
        BadLog, match=r"log.csv:3: record 200, field 5: 'E5' has energy, and a reading has E1, E2, E3, "
    ):
        read(log(tmp_path / "log.csv", energies), "nem12")
    assert read(log(tmp_path / "none.csv", nem12(channel("E5"), day(20240201, 0, 0))), "nem12").rows_in == 2
    third = read(log(tmp_path / "three.csv", nem12(channel("E3"), day(20240201, 1, 2))), "nem12")
    assert column(third, "import_t3_wh") == [0, 1000, 3000]


@pytest.mark.parametrize(
    ("old", "new", "quantity", "end_wh"),
    [
        (99_200, 300, 1_100, 100_000_000),
        (99_200, 300, "", 100_000_000),  # five digits
        (99_200, 300, 57, None),  # an exchange: no register ends there
        ("00300", "01400", None, 100_000_000),  # zeros before its digits
        (300, 1_400, None, None),
    ],
)
def test_where_a_nem13s_register_ends_its_quantity_or_digits_say(
    tmp_path: Path, old: int | str, new: int | str, quantity: int | str | None, end_wh: int | None
) -> None:
    imported = read(log(tmp_path / "log.csv", nem13(("11", "S1", old, new), quantity=quantity)), "nem12")
    assert imported.registry is not None
    assert imported.registry["wraps_wh"].to_list() == [end_wh]


def test_of_a_day_that_comes_in_two_files_the_newest_version_counts_and_registers_go_on(tmp_path: Path) -> None:
    def version(updated: int, *values: int, date: int = 20240201) -> str:
        return day(date, *values).removesuffix(",,,,") + f",,,{updated},"

    old = log(tmp_path / "a-old.csv", nem12(channel(), version(20240202000000, 1, 1)))
    new = log(tmp_path / "b-new.csv", nem12(channel(), version(20240210000000, 2, 3)))
    next_day = log(tmp_path / "c.csv", nem12(channel(), version(20240203000000, 4, 4, date=20240202)))
    for number, paths in enumerate([[old, new, next_day], [new, next_day, old]]):
        tape, _ = import_log(paths, "nem12", tmp_path / f"tape{number}")
        assert tape.readings["import_t1_wh"].to_pylist() == [0, 2000, 5000, 9000, 13000]
        assert tape.info.defects == {"superseded": 2}
        assert tape.info.rows_in == 6


def test_a_channel_of_energy_without_its_unit_is_refused_and_not_another_quantity(tmp_path: Path) -> None:
    text = nem12(channel().replace("kWh", ""), day(20240201, 1, 2))
    with pytest.raises(BadLog, match=r"log.csv:2: field 8: unit '' of E1, expected KWH, WH, MWH"):
        read(log(tmp_path / "log.csv", text), "nem12")


def test_a_box_that_was_exchanged_within_a_day_costs_no_energy_of_either(tmp_path: Path) -> None:
    def half(serial: str, updated: int, *qualities: str) -> list[str]:
        values = day(20240201, 1, 2, quality="V").removesuffix(",,,,") + f",,,{updated},"
        quality = [f"400,{place},{place},{each},," for place, each in enumerate(qualities, 1)]
        return [channel().replace("SER1", serial), values, *quality]

    path = log(tmp_path / "log.csv", nem12(*half("A", 20240202000000, "A", "N"), *half("B", 20240203000000, "N", "A")))
    imported = read(path, "nem12")
    assert column(imported, "import_t1_wh") == [0, 1000, 3000]
    assert imported.defects == {"empty_fields": 1}


def test_a_nem13s_box_may_begin_where_the_one_before_ends(tmp_path: Path) -> None:
    def read_of(serial: str, old: int, new: int, since: int, until: int, quantity: int) -> str:
        both = f"E,{old},{since}000000,A,,,{new},{until}000000,A,,,{quantity}"
        return f"250,NMI1,,1,11,1,{serial},{both},KWH,,,"

    rows = [read_of("S1", 100, 200, 20240101, 20240401, 100), read_of("S2", 0, 150, 20240401, 20240701, 6_000)]
    imported = read(
        log(tmp_path / "log.csv", "\n".join(["100,NEM13,202405010000,MDA1,Ret1", *rows, "900\0\x1a"])), "nem12"
    )
    assert column(imported, "import_t1_wh") == [100_000, 200_000, 0, 150_000]
    assert imported.defects == {"other_sum": 1}, "a multiplier, which the registers do not have"
    steps = walk(None, [{**row, "register": "import_t1", "wh": row["import_t1_wh"], "run_id": None}
                        for row in imported.readings.to_pylist()], Limits(69_000, None, 1_000)).steps  # fmt: skip
    assert sum(step["delta_wh"] or 0 for step in steps) == 250_000
