"""MASA, ASLoRA, Dual LoRA and MultiLoRA as PEFT methods."""

from loraplex.version import __version__

__all__ = ["__version__"]
