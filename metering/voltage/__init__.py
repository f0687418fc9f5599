"""Voltage: windows of a meter, and groups of meters."""
