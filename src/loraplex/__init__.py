"""MASA, ASLoRA, Dual LoRA and MultiLoRA as PEFT methods. Importing this package registers them with PEFT.

The import costs milliseconds: PEFT and torch are imported when something needs them (`lazy.py`).
"""

from typing import TYPE_CHECKING, Any

from loraplex import lazy
from loraplex.plain_folder import to_plain
from loraplex.version import __version__

if TYPE_CHECKING:
    from loraplex.public import (
        AsLoraConfig,
        Calibration,
        DualLoraConfig,
        LoraExport,
        MasaConfig,
        MultiLoraConfig,
        Rank,
        ScheduleCallback,
        add_adapter,
        calibrate,
        clear_cache,
        export_lora,
        gathered_state_dict,
        load_adapter,
        load_schedules,
        save_schedules,
        set_total_steps,
        step,
    )

__all__ = [
    "AsLoraConfig",
    "Calibration",
    "DualLoraConfig",
    "LoraExport",
    "MasaConfig",
    "MultiLoraConfig",
    "Rank",
    "ScheduleCallback",
    "__version__",
    "add_adapter",
    "calibrate",
    "clear_cache",
    "export_lora",
    "gathered_state_dict",
    "load_adapter",
    "load_schedules",
    "save_schedules",
    "set_total_steps",
    "step",
    "to_plain",
]


def __getattr__(name: str) -> Any:
    # Python itself and its tools look for such names, which no module of ours defines.
    if not name.startswith("__"):
        public = lazy.load()
        if name in __all__:
            return getattr(public, name)
        # Modules of the package become its attributes when they are imported.
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


lazy.install()
