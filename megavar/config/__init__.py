"""Configuration: typed sections, YAML with inheritance, dotted overrides, DeepSpeed JSON."""
