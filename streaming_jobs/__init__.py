"""Streaming jobs, one file each; `python -m streaming_jobs` runs all of them in one driver."""

import pkgutil
from importlib import import_module

from lake.streaming import StreamingJob


def discovered() -> list[StreamingJob]:
    """Every job in this folder, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [import_module(f"{__name__}.{name}").JOB for name in names]
