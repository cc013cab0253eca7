"""What vision-language models understand: published benchmarks in their published layouts, one module each."""
