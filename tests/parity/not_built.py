"""Golden vectors that wait for what they describe. This list only shrinks.

A line is a family, or ``family/case`` where the rest of a family is built. It goes when a ``Family`` claims the cases.
"""

NOT_BUILT = {
    "alitok/tokenizer": "AliTok's tokenizers",
    "alitok/tokenizer_stage1_causal": "AliTok's tokenizers",
    "vgt": "VGT's autoencoder, flow head and generator",
    "mar": "MAR's transformer and diffusion loss",
}
