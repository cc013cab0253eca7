"""Checkpoints: atomic, hashed, verified, and independent of the layout that wrote them."""

from megavar.training.checkpoint.checkpointer import Checkpointer
from megavar.training.checkpoint.state import ModuleState
from megavar.training.checkpoint.weights import find_checkpoint, load_weights, read_weights

__all__ = ["Checkpointer", "ModuleState", "find_checkpoint", "load_weights", "read_weights"]
