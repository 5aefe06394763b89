"""MASA, ASLoRA, Dual LoRA and MultiLoRA as PEFT methods. Importing this package registers them with PEFT."""

from loraplex.cache import clear_cache
from loraplex.calibrate import Calibration, calibrate
from loraplex.export import LoraExport, Rank, export_lora
from loraplex.finite import allow_nonfinite
from loraplex.loss_scaling import loss_scale
from loraplex.methods import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig
from loraplex.parallel import gathered_state_dict
from loraplex.plain_folder import to_plain
from loraplex.registry import add_adapter, load_adapter
from loraplex.schedule import (
    load_schedules,
    restart_averages,
    save_schedules,
    set_process_group,
    set_total_steps,
    step,
)
from loraplex.schedule_callback import ScheduleCallback
from loraplex.version import __version__

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
    "allow_nonfinite",
    "calibrate",
    "clear_cache",
    "export_lora",
    "gathered_state_dict",
    "load_adapter",
    "load_schedules",
    "loss_scale",
    "restart_averages",
    "save_schedules",
    "set_process_group",
    "set_total_steps",
    "step",
    "to_plain",
]
