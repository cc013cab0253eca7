"""Transformer blocks made of Megatron-core parts."""
