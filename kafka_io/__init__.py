"""Kafka clients of the project: what asks Kafka for what it has."""
