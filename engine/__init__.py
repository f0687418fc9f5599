"""How a job is run: batch and context, stream, partition tasks, watermark, checkpoint, metrics, night, session."""
