"""The Spark session of every job: UTC, few shuffle partitions, Python workers of this environment."""

import os
import signal
import sys
import threading

from pyspark.sql import SparkSession

from lake.spark import hadoop_options
from lake.store import store
from schemas.errors import ConfigError
from settings import home


def spark_session(name: str, java_options: str = "", **options: str) -> SparkSession:
    """The session, made once per process; under spark-submit it takes what was submitted.

    Args:
        name: shown by Spark as the application's name.
        java_options: for the JVMs of driver and executors; those of spark-submit's driver are its own.
        options: Spark options with `_` for `.`, over the defaults here.

    Raises:
        ConfigError: under spark-submit a variable is missing by which Spark opens the store.
    """
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # a task has one core
    builder = SparkSession.builder.appName(name)
    if master := os.environ.get("METERSTREAM_SPARK_MASTER"):  # a cluster; else spark-submit's, else this machine
        builder = builder.master(master)
    defaults = {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.adaptive.enabled": "false",  # its extra stages cost more than they save on batches of seconds
        "spark.sql.execution.arrow.maxRecordsPerBatch": "100000",
        "spark.sql.streaming.numRecentProgressUpdates": "50",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.warehouse.dir": str(home() / "tmp" / "warehouse"),
        "spark.executor.extraJavaOptions": f"-Djava.io.tmpdir=. -XX:-UsePerfData {java_options}",  # of the executor
        "spark.scheduler.mode": "FAIR",
        "spark.ui.enabled": "false",
    }
    filled = store().filled
    if "PYSPARK_GATEWAY_PORT" in os.environ and filled:
        msg = f"under spark-submit Java was there before: set {', '.join(filled)} in the environment for {store().url}"
        raise ConfigError(msg)
    defaults |= hadoop_options(store().url)
    if java_options:  # else what spark-defaults.conf says stays
        defaults["spark.driver.extraJavaOptions"] = java_options
    for option, value in (defaults | {k.replace("_", "."): v for k, v in options.items()}).items():
        builder = builder.config(option, value)
    asked_by_ctrl_c = signal.getsignal(signal.SIGINT)
    session = builder.getOrCreate()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, asked_by_ctrl_c)  # Spark's own cancels what runs, in the middle of a batch
    session.sparkContext.setLogLevel("ERROR")
    return session
