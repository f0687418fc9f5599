"""Validation, estimation and checks of intervals: the night."""
