"""Processes, meshes, seeds: everything that knows about ranks and Megatron-core's assumptions."""
