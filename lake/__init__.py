"""Tables and reports on storage: where they lie, how they are written, read and compacted."""
