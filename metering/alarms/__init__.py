"""Alarms: their life cycle, derived ones, outages and counts."""
