"""A home of a release before Delta tables is refused with what to do, and goes on after it as if nothing had been."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from engine.intents import Intents, nested
from engine.job import StreamingJob
from engine.runner import Runner
from engine.state import _content, _known
from lake.reading import Lake
from lake.upkeep import Upkeep
from schemas.errors import ConfigError, StateLost
from schemas.tables import TABLES
from stack.migrate import migrate
from streaming_jobs import consumption_deltas, voltage_deviation
from tests.lake_by_hand import add_rows
from tests.streaming.feed import SETTINGS, Feed, batches, flush, lake, take


def undisturbed(home: Path, job: StreamingJob, is_flushed: bool) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        (home / "undisturbed").mkdir()
        patch.setenv("METERSTREAM_HOME", str(home / "undisturbed"))
        feed = Feed()
        feed.add(*batches()[:2])
        take(None, feed, Runner(job, SETTINGS))
        if is_flushed:
            flush(Runner(job, SETTINGS))
        feed.add(batches()[2])
        after = Runner(job, SETTINGS)
        take(None, feed, after)
        return lake(after)


def age(home: Path, job: StreamingJob) -> None:
    """Brings a home into the form that it had before: files under a glob, a checkpoint of plans and commits."""
    intents = Intents(job.name, job.version)
    newest = intents.newest()
    assert newest
    done = newest.number - newest.is_flush
    old = home / "state" / "checkpoints" / f"{job.name}-v{job.version}"
    states = home / "state" / job.name / intents.query_id
    for folder in (old / "offsets", old / "commits", states):
        folder.mkdir(parents=True)
    (old / "metadata").write_text(json.dumps({"id": intents.query_id}))
    facts = {"batchTimestampMs": 1_711_850_400_000, "startOffsets": nested(newest.starts), "topicIds": newest.topic_ids}
    for batch in (done, done + 1):  # one more was begun
        text = f"v1\n{json.dumps(facts)}\n{json.dumps(nested(newest.ends))}"
        (old / "offsets" / str(batch)).write_text(text)
    (old / "commits" / str(done)).write_text(f"v1\n{json.dumps({'state': newest.state})}")
    if newest.is_flush:
        (states / f"{done}.flush").mkdir()
        (states / f"{done}.flushed").write_text(json.dumps(newest.state))
    for file in (home / intents.states).iterdir():
        file.rename(states / file.name)
    shutil.rmtree(home / intents.folder)
    for table in TABLES:
        files = {*Lake().files(table)}
        for file in (home / "lake" / table).glob("*/*.parquet"):
            if str(file) not in files:
                file.unlink()
        shutil.rmtree(home / "lake" / table / "_delta_log", ignore_errors=True)
    a_file = next((home / "lake" / "accounting").glob("date=*/*.parquet"))
    shutil.copy(a_file, a_file.with_name(f"{job.name}-{intents.query_id}-{done + 1:08d}-0.parquet"))  # of the one begun


@pytest.mark.parametrize("is_flushed", [False, True])
@pytest.mark.parametrize("job", [consumption_deltas.JOB, voltage_deviation.JOB], ids=lambda job: job.name)
def test_an_old_home_is_refused_and_after_its_migration_goes_on_where_it_was(
    home: Path, job: StreamingJob, is_flushed: bool
) -> None:
    feed = Feed()
    feed.add(*batches()[:2])
    take(None, feed, Runner(job, SETTINGS))
    if is_flushed:
        flush(Runner(job, SETTINGS))
    age(home, job)
    for cache in (_known.clear, _content.cache_clear):
        cache()
    feed.add(batches()[2])
    with pytest.raises(StateLost, match=f"^{job.name}: file://{home} is of an earlier release. .*stack migrate"):
        take(None, feed, Runner(job, SETTINGS))
    report = home / "reports" / "daily_consumption_v1" / "date=2024-03-31" / "part-00000-x.parquet"
    report.parent.mkdir(parents=True)
    pl.DataFrame({"meter_id": ["a"]}).write_parquet(report)
    with pytest.raises(ConfigError, match="is of an earlier release: stop all, copy it, then python -m stack migrate"):
        add_rows("events", [{"meter_id": "a"}], "2024-03-31")
    said: list[str] = []
    migrate(said.append)
    assert any(line.startswith(f"{job.name}: stands after batch ") for line in said), said
    assert [file.name for file in report.parent.iterdir()] == ["0000-of-0001.parquet"]
    with pytest.raises(ConfigError, match="nothing to migrate"):
        migrate()
    after = Runner(job, SETTINGS)
    take(None, feed, after)
    expected = undisturbed(home, job, is_flushed)
    found = lake(after)
    for table in (*job.writes, *job.current):
        assert found[table] == expected[table], table
    assert sum(line[3] for line in found["accounting"]) == sum(line[3] for line in expected["accounting"])
    Upkeep(files=2).once()
    assert {table: lake(after)[table] for table in job.writes} == {table: expected[table] for table in job.writes}


def test_a_job_whose_old_state_nobody_can_read_does_not_begin_beside_its_rows(home: Path) -> None:
    job, feed = voltage_deviation.JOB, Feed()
    feed.add(*batches()[:2])
    take(None, feed, Runner(job, SETTINGS))
    age(home, job)
    newer = replace(job, version=job.version + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stack.migrate.discovered", lambda: [newer])
        said: list[str] = []
        migrate(said.append)
    assert f"{job.name}: {job.name}-v{job.version} cannot be read; run python -m stack begin-anew {job.name}" in said
    with pytest.raises(StateLost, match=f"of version {job.version}, and version {newer.version} cannot read it"):
        take(None, feed, Runner(newer, SETTINGS))
