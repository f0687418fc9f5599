"""What the numbers mean: pure functions over Polars frames, without Spark, Kafka, files, environment or settings."""
