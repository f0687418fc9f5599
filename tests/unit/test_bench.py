import json
import subprocess
import sys
from pathlib import Path

from tests.wire import small_tape

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.replay", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_quick_bench_prints_a_table_and_ends_with_a_line_of_json(tmp_path: Path) -> None:
    small_tape.write(tmp_path / "tape")
    done = bench("--quick", "--only", "encode", "--tape", str(tmp_path / "tape"), "--json")
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    assert any("records per CPU-second" in line for line in shown)
    told = json.loads(last)
    assert set(told) == {"machine", "load_at_end", "encode"}
    assert {"cores", "cpu", "memory_gb", "kernel", "java", "python", "tape", "versions"} <= set(told["machine"])
    assert len(told["encode"]["rows"]) == 3
    for row in told["encode"]["rows"]:
        assert row["records"] > 0
        assert len(row["wall_s"]) == len(row["cpu_s"]) == 2
        assert row["records_per_cpu_s"]["min"] <= row["records_per_cpu_s"]["median"] <= row["records_per_cpu_s"]["max"]
    assert all(ratio["value"] > 0 for ratio in told["encode"]["ratios"])


def test_an_unknown_part_is_wrong_use() -> None:
    done = bench("--only", "encode,decode")
    assert done.returncode == 2
    assert "decode" in done.stderr
