"""Telegrams → readings; on the real telegrams of METER_LOGS where it is set, on our own otherwise."""

import json
import os
import re
import string
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from dsmr_parser import telegram_specifications
from dsmr_parser.parsers import TelegramParser
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import decode, encode
from schemas.dsmr import beyond_tariffs_wh, crc16, decode_telegram, is_whole, power_failures, split_telegrams, with_crc
from schemas.errors import InvalidMessage

LOGS = Path(os.environ.get("METER_LOGS") or Path(__file__).parent.parent / "logs")
TELEGRAMS = sorted((LOGS / "p1-telegrams").glob("*.txt"))
CLOCK = datetime(2020, 1, 1, tzinfo=UTC)

V5 = """/MST5\\OWN-0001

1-3:0.2.8(50)
0-0:1.0.0(190324150519W)
1-0:1.8.1(003432.827*kWh)
1-0:1.8.2()
1-0:1.7.0(00.378*kW)
1-0:32.7.0(237.1*V)
1-0:31.7.0(002*A)
!"""


def detail_of(telegram: bytes) -> str:
    with pytest.raises(InvalidMessage) as caught:
        decode_telegram(telegram, "m1")
    assert caught.value.reason == "invalid_telegram"
    return caught.value.detail


def sealed(telegram: bytes) -> bytes:
    """The telegram with the CRC that its text asks for, cut off or not."""
    return with_crc(re.split(rb"[\r\n]!", telegram)[0].decode("ascii").rstrip("\r\n") + "\n!")


def expected(known: dict[str, Any]) -> dict[str, Any]:
    """Our fields from what another parser's authors expect of a telegram."""
    electricity = known.get("electricity", {})
    fields = {"import_w": electricity.get("powerReceivedTotal"), "export_w": electricity.get("powerReturnedTotal")}
    fields["tariff"] = electricity.get("currentTariff")
    for tariff in ("1", "2"):
        both = electricity.get("tariffs", {}).get(tariff, {})
        fields[f"import_t{tariff}_wh"], fields[f"export_t{tariff}_wh"] = both.get("received"), both.get("returned")
    if "tariffs" not in electricity:
        total = electricity.get("total", {})
        fields["import_t1_wh"], fields["export_t1_wh"] = total.get("received"), total.get("returned")
    events = known.get("metadata", {}).get("events", {})
    fields["power_failure_count"] = events.get("powerFailures")
    fields["long_power_failure_count"] = events.get("longPowerFailures")
    for phase in ("l1", "l2", "l3"):
        fields[f"import_{phase}_w"] = electricity.get("powerReceived", {}).get(phase)
        fields[f"export_{phase}_w"] = electricity.get("powerReturned", {}).get(phase)
        fields[f"sag_count_{phase}"] = events.get("voltageSags", {}).get(phase)
        fields[f"swell_count_{phase}"] = events.get("voltageSwells", {}).get(phase)
        for quantity, unit in (("voltage", "mv"), ("current", "ma")):
            value = electricity.get(quantity, {}).get(phase)
            fields[f"{quantity}_{phase}_{unit}"] = None if value is None else int(Decimal(str(value)) * 1000)
    return fields


def test_crc_is_that_of_the_standard_algorithm() -> None:
    assert crc16(b"123456789") == 0xBB3D  # CRC-16/ARC's check value
    assert crc16(b"") == 0


@pytest.mark.parametrize("path", TELEGRAMS, ids=lambda path: path.stem)
def test_a_telegram_decodes_exactly_when_its_crc_holds_and_it_has_a_time(path: Path) -> None:
    known_at = path.with_suffix(".json")
    known = json.loads(known_at.read_text()) if known_at.exists() else {}
    for _, telegram in split_telegrams(path.read_bytes()):
        try:
            reading = decode_telegram(telegram, "m1")
        except InvalidMessage as refused:
            assert re.search(r"^CRC is|without a time|no end line|not YYMMDD|has a clock, but", refused.detail)
            assert not known.get("crcValid"), refused.detail
        else:
            assert known.get("crcValid", True)
            assert decode(encode("reading", reading), "reading") == reading


@pytest.mark.parametrize("path", TELEGRAMS, ids=lambda path: path.stem)
def test_each_quantity_is_what_the_authors_of_another_parser_expect(path: Path) -> None:
    known_at = path.with_suffix(".json")
    _, telegram = next(split_telegrams(path.read_bytes()))
    try:
        reading = decode_telegram(
            sealed(telegram) if b"0.2.8(" in telegram or b"96.1.4(" in telegram else telegram, "m1", clock=CLOCK
        )
    except InvalidMessage as refused:  # no end, a date that is none, a meter that says no version
        assert re.search(r"no end line|no such time|has a clock|CRC is", refused.detail), refused
        return
    if known_at.exists():
        known = json.loads(known_at.read_text())
        wrong = {
            name: (value, reading[name])
            for name, value in expected(known).items()
            if value is not None and value != reading[name]
        }
        assert not wrong
        if "timestamp" in known["metadata"] and reading["observed_at"] != CLOCK:  # local time there, whatever its Z
            local = datetime.fromisoformat(known["metadata"]["timestamp"])
            stamp = re.search(rb"0-0:1\.0\.0\(\d+([SW])", telegram)
            assert stamp is not None
            assert reading["observed_at"] == local - timedelta(hours=2 if stamp[1] == b"S" else 1)


def test_every_whole_telegram_of_a_log_decodes_as_dsmr_parser_decodes_it() -> None:
    parser = TelegramParser(telegram_specifications.V5)
    names = {
        "ELECTRICITY_USED_TARIFF_1": ("import_t1_wh", 1000),
        "ELECTRICITY_USED_TARIFF_2": ("import_t2_wh", 1000),
        "ELECTRICITY_DELIVERED_TARIFF_1": ("export_t1_wh", 1000),
        "CURRENT_ELECTRICITY_USAGE": ("import_w", 1000),
        "INSTANTANEOUS_VOLTAGE_L1": ("voltage_l1_mv", 1000),
        "INSTANTANEOUS_VOLTAGE_L3": ("voltage_l3_mv", 1000),
        "INSTANTANEOUS_CURRENT_L3": ("current_l3_ma", 1000),
        "VOLTAGE_SWELL_L2_COUNT": ("swell_count_l2", 1),
        "LONG_POWER_FAILURE_COUNT": ("long_power_failure_count", 1),
    }
    for path in (LOGS / "dsmr5-1s").glob("*.txt"):
        pieces = [piece for _, piece in split_telegrams(path.read_bytes())]
        assert b"".join(pieces) == path.read_bytes()
        assert [is_whole(piece) for piece in pieces] == [False] + [True] * (len(pieces) - 1)
        for piece in pieces[1:61]:
            ours = decode_telegram(piece, "m1")
            theirs = parser.parse(piece.replace(b"\n", b"\r\n").decode())
            assert ours["observed_at"] == theirs.P1_MESSAGE_TIMESTAMP.value
            for name, (field, factor) in names.items():
                assert ours[field] == Decimal(getattr(theirs, name).value) * factor
        for piece in pieces[61:]:
            assert decode_telegram(piece, "m1")["dialect"] == "dsmr-5"


def test_line_ends_may_be_lf_or_crlf() -> None:
    telegram = with_crc(V5)
    assert decode_telegram(telegram, "m1") == decode_telegram(telegram.replace(b"\r\n", b"\n"), "m1")


def test_an_absent_or_empty_quantity_is_null_and_units_are_exact() -> None:
    reading = decode_telegram(with_crc(V5), "m1")
    assert reading["import_t1_wh"] == 3432827
    assert reading["import_t2_wh"] is None
    assert (reading["import_w"], reading["voltage_l1_mv"], reading["current_l1_ma"]) == (378, 237100, 2000)
    assert reading["voltage_l2_mv"] is None and reading["tariff"] is None and reading["equipment_id"] is None
    assert {reading[name] for name in ("sent_at", "received_at", "run_id", "seq")} == {None}


@pytest.mark.parametrize(
    ("stamp", "utc"),
    [
        ("201025023000S", datetime(2020, 10, 25, 0, 30, tzinfo=UTC)),
        ("201025023000W", datetime(2020, 10, 25, 1, 30, tzinfo=UTC)),
        ("210701120000W", datetime(2021, 7, 1, 11, tzinfo=UTC)),  # the flag settles, not the season
    ],
)
def test_the_season_flag_settles_the_time(stamp: str, utc: datetime) -> None:
    assert decode_telegram(with_crc(V5.replace("190324150519W", stamp)), "m1")["observed_at"] == utc


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("190324150519W", "190332150519W", "no such time"),
        ("190324150519W", "190324150519", "not YYMMDDhhmmss and S or W"),
        ("0-0:1.0.0(190324150519W)\n", "", "without a time"),
        ("00.378*kW", "0x.378*kW", "not a number"),
        ("00.378*kW", "-0.378*kW", "not a number"),
        ("003432.827*kWh", "003432.8275*kWh", "not a whole number of Wh"),
        ("003432.827*kWh", "003432.827*m3", "unit 'm3'"),
        ("1-0:31.7.0(002*A)", "1-0:31.7.0(002*A", "garbled line"),
        ("1-0:31.7.0(002*A)", "1-0:31.7", "garbled line"),
        ("1-0:31.7.0(002*A)", "(\x7f\x01", "garbled line"),
        ("1-0:31.7.0(002*A)", "1-0:1.8.1(000001.000*kWh)", "import_t1_wh twice"),
        ("0.2.8(50)", "0.2.8(90)", "version 90"),
    ],
)
def test_what_a_telegram_cannot_say_is_refused_with_its_line_even_where_the_crc_holds(
    before: str, after: str, reason: str
) -> None:
    assert before in V5
    assert reason in detail_of(with_crc(V5.replace(before, after)))


def test_a_garbled_or_cut_off_telegram_is_refused() -> None:
    telegram = with_crc(V5)
    assert "CRC is" in detail_of(telegram.replace(b"237.1", b"237.2"))
    assert "no end line" in detail_of(telegram[:-12])
    assert "does not begin with /" in detail_of(telegram[5:])
    assert "garbled" in detail_of(telegram.replace(b"OWN", b"\xffWN"))
    assert "instead of a CRC of at most 4 hexadecimal digits" in detail_of(telegram + telegram[:9])
    assert "no CRC" in detail_of(telegram[: telegram.rindex(b"!") + 1])
    assert "does not begin with /" in detail_of(b"")


@given(st.integers(0, len(with_crc(V5)) - 7), st.integers(1, 255))
def test_no_flipped_byte_before_the_crc_goes_unseen(place: int, flip: int) -> None:
    telegram = bytearray(with_crc(V5))
    telegram[place] ^= flip
    if bytes(telegram).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") != with_crc(V5):
        detail_of(bytes(telegram))


@given(st.binary(max_size=400))
def test_any_bytes_give_a_reading_or_a_reason_and_nothing_else(data: bytes) -> None:
    for telegram in (data, b"/" + data + b"\r\n!", b"/A\r\n" + data + b"\r\n!\r\n"):
        try:
            decode_telegram(telegram, "m1", clock=CLOCK)
        except InvalidMessage as refused:
            assert refused.reason == "invalid_telegram"


@given(st.text(string.ascii_letters + "/!\r\n", max_size=200))
def test_splitting_a_log_loses_nothing_but_blank_lines(text: str) -> None:
    data = text.encode()
    pieces = list(split_telegrams(data))
    assert b"".join(piece for _, piece in pieces).split() == data.split()
    for line, piece in pieces:
        assert data.splitlines()[line - 1] == piece.splitlines()[0]


def test_a_telegram_without_a_clock_takes_the_callers() -> None:
    telegram = V5.replace("1-3:0.2.8(50)\n0-0:1.0.0(190324150519W)\n", "").encode()
    two = decode_telegram(telegram.replace(b"00.378", b"0000.37"), "m1", clock=CLOCK)
    three = decode_telegram(telegram.replace(b"00.378", b"000.37"), "m1", clock=CLOCK)
    assert (two["dialect"], three["dialect"]) == ("dsmr-2.2", "dsmr-3")
    assert two["observed_at"] == CLOCK and two["import_w"] == 370


@pytest.mark.parametrize(
    ("written", "equipment"),
    [("4D5354", "MST"), ("serienummer", "serienummer"), ("00112233", "00112233"), ("4D535", "4D535")],
)
def test_an_equipment_id_is_text_where_its_hexadecimal_is_text(written: str, equipment: str) -> None:
    telegram = with_crc(V5.replace("1-0:1.8.2()", f"0-0:96.1.1({written})"))
    assert decode_telegram(telegram, "m1")["equipment_id"] == equipment


CLOCKED = """/ABC5OWN

0-0:1.0.0(240501140000S)
0-0:42.0.0(OWN1012400000000)
0-0:96.14.0(TARIFF 2)
1-0:1.8.0(000138.583*kWh)
1-0:1.8.1(000037.047*kWh)
1-0:1.8.2(000101.536*kWh)
1-0:1.7.0(0004.795*kW)
1-0:32.7.0(228.2*V)
!"""
"""What other countries' meters say: a clock and a CRC, no version."""
OPTICAL = """/OWN5Q V3

1-0:0.0.0*255(0272000000000)
1-0:1.8.0*255(00066982.7369255*kWh)
1-0:1.7.0*255(-000580.75*W)
1-0:21.7.0*255(000210.92*W)
1-0:41.7.0*255(-000791.67*W)
!
"""
"""A meter's optical port: finer than whole Wh, a sign for the direction, no clock and no CRC."""


def test_a_telegram_with_a_clock_and_a_crc_needs_no_version() -> None:
    reading = decode_telegram(with_crc(CLOCKED), "m1")
    assert (reading["dialect"], reading["observed_at"]) == ("p1", datetime(2024, 5, 1, 12, tzinfo=UTC))
    assert (reading["import_t1_wh"], reading["import_t2_wh"], reading["tariff"]) == (37_047, 101_536, 2)
    assert "no CRC" in detail_of(CLOCKED.encode())


def test_an_optical_ports_numbers_are_whole_ones_of_ours_and_its_sign_is_the_direction() -> None:
    at = datetime(2024, 5, 1, 12, tzinfo=UTC)
    reading = decode_telegram(OPTICAL.encode(), "m1", clock=at)
    assert (reading["dialect"], reading["observed_at"], reading["import_t1_wh"]) == ("iec62056-21", at, 66_982_736)
    assert (reading["import_w"], reading["export_w"]) == (0, 580)
    assert (reading["import_l1_w"], reading["import_l2_w"], reading["export_l2_w"]) == (210, 0, 791)
    assert "without a time" in detail_of(OPTICAL.encode())
    assert "not a number" in detail_of(OPTICAL.replace("66982.73", "6698x.73").encode())


@pytest.mark.parametrize("tail", [b"\0\r\n", b"\r\n\0", b" \r\n"], ids=str)
def test_a_nul_after_the_crc_says_nothing(tail: bytes) -> None:
    telegram = with_crc(V5)
    assert decode_telegram(telegram.rstrip() + tail, "m1") == decode_telegram(telegram, "m1")


def test_a_crc_may_lack_its_leading_zeros() -> None:
    found = next(
        telegram
        for watts in range(1_000)
        if (telegram := with_crc(CLOCKED.replace("0004.795", f"0004.{watts:03d}")))[-6:-5] == b"0"
    )
    short = found[:-6] + found[-6:].lstrip(b"0")
    assert len(short) < len(found)
    assert decode_telegram(short, "m1") == decode_telegram(found, "m1")


FOUR = V5.replace("1-0:1.8.2()", "1-0:1.8.2(000001.000*kWh)\n1-0:1.8.3(000250.040*kWh)\n1-0:1.8.4(000010.000*kWh)")


def four(*lines: str) -> dict[str, Any]:
    """A telegram of four import tariffs, with further lines."""
    return decode_telegram(with_crc(FOUR.removesuffix("!") + "".join(f"{line}\n" for line in lines) + "!"), "m1")


def test_tariffs_three_and_four_are_registers_of_their_own_and_a_total_is_their_check() -> None:
    reading = four()
    t1, t2 = reading["import_t1_wh"] or 0, reading["import_t2_wh"] or 0
    assert (reading["import_t3_wh"], reading["import_t4_wh"], reading["export_t3_wh"]) == (250_040, 10_000, None)
    total_wh = t1 + t2 + 260_040
    for total in (total_wh, total_wh + 5, total_wh + 2_000_000):  # a tariff may have begun later than its total
        telegram = FOUR.removesuffix("!") + f"1-0:1.8.0({total / 1000:010.3f}*kWh)\n!"
        assert decode_telegram(with_crc(telegram), "m1") == reading
        assert beyond_tariffs_wh(with_crc(telegram), reading) == {"import": (total - total_wh, 5)}


def test_energy_that_a_reading_has_no_register_for_is_not_read_past() -> None:
    with pytest.raises(InvalidMessage, match=r"energy that a reading has no register for: '1-0:1.8.5\(000000.001"):
        four("1-0:1.8.5(000000.001*kWh)")
    assert four("1-0:1.8.5(000000.000*kWh)") == four()


def test_a_total_is_the_first_register_where_no_tariff_counts() -> None:
    plain = "/XMX5XMXABCE000018914\r\n\r\n1-0:1.8.0(004179.186*kWh)\r\n{}0-0:1.0.0(190324150519W)\r\n!"
    for tariffs in ("", "1-0:1.8.1(000000.000*kWh)\r\n1-0:1.8.2(000000.000*kWh)\r\n"):
        assert decode_telegram(with_crc(plain.format(tariffs)), "m1")["import_t1_wh"] == 4_179_186


def test_a_failure_log_is_read_as_far_as_it_can_be() -> None:
    line = "1-0:99.97.0(3)(0-0:96.7.19)(190324141000W)(0000000600*s)(000101000001W)(2147583646*s)(190399000000W)(5*s)"
    found = power_failures(with_crc(V5.removesuffix("!") + line + "\n!"))
    assert found == [(datetime(2019, 3, 24, 13, 0, tzinfo=UTC), datetime(2019, 3, 24, 13, 10, tzinfo=UTC))]
    for begin in ("1-0:99.97.0.255(", "1-0:99.97.0*255("):
        other = with_crc(V5.removesuffix("!") + line.replace("1-0:99.97.0(", begin) + "\n!")
        assert power_failures(other) == found
    assert power_failures(with_crc(V5.removesuffix("!") + "1-0:99.97.0(0)(0-0:96.7.19)\n!")) == []


def test_an_irish_meter_has_a_clock_and_no_crc() -> None:
    irish = "/ISk5\\2MIE5X-200\r\n\r\n0-0:96.1.0(1)\r\n0-0:1.0.0(230202132747W)\r\n1-0:1.8.1(000010.181*kWh)\r\n!\r\n"
    reading = decode_telegram(irish.encode(), "m1")
    assert (reading["import_t1_wh"], reading["dialect"]) == (10_181, "p1")
    assert "no CRC" in detail_of(irish.replace("MIE5", "XIE5").encode())


def test_a_nul_between_telegrams_and_at_the_end_of_a_log_says_nothing() -> None:
    one = with_crc(V5)
    for log in (one + b"\0" + one + b"\r\n\0", b"\0" + one + b"\0" + one + b"\x1a"):
        assert [piece for _, piece in split_telegrams(log)] == [one, one]


def test_a_telegram_with_a_version_and_a_code_of_an_optical_port_is_one_of_its_version() -> None:
    text = V5.removesuffix("!") + "1-0:1.8.0*255(003433.827*kWh)\n!"
    assert decode_telegram(with_crc(text), "m1")["dialect"] == "dsmr-5"
