"""Nightly jobs, one file each; `python -m batch_jobs --date D` runs all of them in one session."""

import pkgutil
from importlib import import_module

from engine.night import BatchJob, in_order


def discovered() -> list[BatchJob]:
    """Every job in this folder, each after those whose reports it reads."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return in_order(import_module(f"{__name__}.{name}").JOB for name in names)
