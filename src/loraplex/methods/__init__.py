"""One room per paper. Importing this package registers the methods with PEFT."""

from loraplex.methods.aslora.method import AsLoraConfig, AsLoraModel
from loraplex.methods.dual_lora.method import DualLoraConfig, DualLoraModel
from loraplex.methods.masa.method import MasaConfig, MasaModel
from loraplex.methods.multilora import MultiLoraConfig, MultiLoraModel
from loraplex.tuner.entry_points import guard_entry_points
from loraplex.tuner.registry import register
from loraplex.tuner.status import patch_layer_status

register(MasaConfig, MasaModel)
register(AsLoraConfig, AsLoraModel)
register(DualLoraConfig, DualLoraModel)
register(MultiLoraConfig, MultiLoraModel)
guard_entry_points()
patch_layer_status()

__all__ = ["AsLoraConfig", "DualLoraConfig", "MasaConfig", "MultiLoraConfig"]
