"""The loop, the engine, checkpoints and what watches them."""
