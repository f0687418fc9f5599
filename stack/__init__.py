"""The embedded stack: broker, Kafka, bridge and streaming jobs as native processes of one machine."""
