"""Golden vectors that wait for what they describe. This list only shrinks.

A line is a family, or ``family/case`` where the rest of a family is built. It goes when a ``Family`` claims the cases.
"""

NOT_BUILT = {
    "vgt/flow_head": "VGT's flow head",
    "vgt/flow_head_ddt": "VGT's flow head",
    "vgt/generation_scheduler": "QueryAR",
    "vgt/queryar_generate_acc1": "QueryAR",
    "vgt/queryar_generate_acc4": "QueryAR",
    "vgt/queryar_train": "QueryAR",
    "mar": "MAR's transformer and diffusion loss",
}
