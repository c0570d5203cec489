"""Files, stores, executors, and modules that take long to import."""

import gc
import importlib
from types import ModuleType


def imported(name: str) -> ModuleType:
    """Import a module, out of the garbage collector's sight.

    torch makes a million objects, all of which stay; the collector looks at them again and again,
    a fifth of the start's time. What was imported is left frozen (`gc.freeze`) only where
    something already is: in a process that is ours, see `kelp.cli.main`.
    """
    collects, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if not frozen:
            gc.unfreeze()  # to the oldest generation
        if collects:
            gc.enable()
