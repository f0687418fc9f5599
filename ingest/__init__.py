"""MQTT → Kafka: the bridge that acknowledges a message only after Kafka has it."""
