"""Each paper as an algorithm: batch in, named losses out."""
