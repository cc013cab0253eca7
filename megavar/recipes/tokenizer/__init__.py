"""Training of image tokenizers."""
