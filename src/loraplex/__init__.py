"""MASA, ASLoRA, Dual LoRA and MultiLoRA as PEFT methods. Importing this package registers them with PEFT."""

from loraplex.calibrate import calibrate
from loraplex.methods import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig
from loraplex.registry import add_adapter, load_adapter
from loraplex.schedule import ScheduleCallback, set_total_steps, step
from loraplex.version import __version__

__all__ = [
    "AsLoraConfig",
    "DualLoraConfig",
    "MasaConfig",
    "MultiLoraConfig",
    "ScheduleCallback",
    "__version__",
    "add_adapter",
    "calibrate",
    "load_adapter",
    "set_total_steps",
    "step",
]
