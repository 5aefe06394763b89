"""One room per paper. Importing this package registers the methods with PEFT."""

from loraplex.entry_points import guard_entry_points
from loraplex.methods.aslora import AsLoraConfig, AsLoraModel
from loraplex.methods.dual_lora import DualLoraConfig, DualLoraModel
from loraplex.methods.masa import MasaConfig, MasaModel
from loraplex.methods.multilora import MultiLoraConfig, MultiLoraModel
from loraplex.registry import open_doors, register

register(MultiLoraConfig, MultiLoraModel)
register(AsLoraConfig, AsLoraModel)
register(DualLoraConfig, DualLoraModel)
register(MasaConfig, MasaModel)
open_doors()
guard_entry_points()

__all__ = ["AsLoraConfig", "DualLoraConfig", "MasaConfig", "MultiLoraConfig"]
