"""Streaming jobs, one file each; `python -m streaming_jobs` runs all of them in one driver."""

import pkgutil
from importlib import import_module

from engine.job import StreamingJob


def discovered() -> list[StreamingJob]:
    """Every job in this folder that runs by batches, by name; critical_events has a driver of its own."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return [module.JOB for module in modules if hasattr(module, "JOB")]
