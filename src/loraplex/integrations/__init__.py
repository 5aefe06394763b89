"""Doors to programs that people use already, one module each; they import torch and PEFT only when something opens."""
