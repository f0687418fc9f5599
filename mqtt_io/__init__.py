"""The MQTT client of the project."""
