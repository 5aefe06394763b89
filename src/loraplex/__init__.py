"""MASA, ASLoRA, Dual LoRA and MultiLoRA as PEFT methods. Importing this package registers them with PEFT."""

from loraplex.export.lora import LoraExport, Rank, export_lora
from loraplex.export.peft_conversion import patch_peft_conversion
from loraplex.export.plain_folder import to_plain
from loraplex.methods import AsLoraConfig, DualLoraConfig, MasaConfig, MultiLoraConfig
from loraplex.runtime.loss_scaling import loss_scale
from loraplex.runtime.parallel import gathered_state_dict
from loraplex.tuner.cache import clear_cache
from loraplex.tuner.calibration import Calibration, calibrate
from loraplex.tuner.finite import allow_nonfinite
from loraplex.tuner.hotswap import hotswap, patch_peft_hotswap
from loraplex.tuner.registry import add_adapter, load_adapter
from loraplex.tuner.schedule_callback import ScheduleCallback
from loraplex.tuner.schedules import (
    load_schedules,
    restart_averages,
    save_schedules,
    set_process_group,
    set_total_steps,
    step,
)
from loraplex.version import __version__

patch_peft_conversion()
patch_peft_hotswap()

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
    "hotswap",
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
