"""p(tokens | condition): embed, blocks, head, and the decoding step."""
