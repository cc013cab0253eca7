"""reAR's codebook-embedding regularization."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.terms.base import TermChoice


class CodebookEmbeddingConfig(TermChoice):
    """Hidden states resemble code vectors of the true tokens: those read early, those predicted late (reAR Eq. 6).

    Layers are counted as in the paper's tables: 0 is the input, n the output of the n-th block. The paper has EN@0 with
    DE@15 of 20 blocks and DE@18 of 24.
    """

    implementation: ClassVar[str] = "megavar.recipes.terms.codebook_embedding:CodebookEmbedding"

    name: Literal["codebook_embedding"] = "codebook_embedding"
    encoding: int | None = Field(0, ge=0)
    """EN: layer that recovers the code vector of the current token; none leaves it out."""
    encoding_zero: Literal["embedding", "first_block"] = "embedding"
    """What layer 0 of ``encoding`` is. ``embedding``: what the first block reads, where the similarity of a plain model
    is highest (appendix C.2). ``first_block``: its output ("the 1st layer", section 3.2); layer n is then the output of
    block n + 1, for the encoding layer only: Table 3 has DE@20 of 20 blocks."""
    decoding: int | Literal["three_quarters"] | None = "three_quarters"
    """DE: layer that predicts the code vector of the next token. ``three_quarters`` of the depth: 15 of 20, 18 of 24;
    none leaves it out."""
    hidden: int = Field(2048, ge=1)
    """Width of the MLP's one hidden layer."""
    shared: bool = True
    """Whether both layers have one MLP (h_phi of Eq. 6) or each its own."""
    output: Literal["codebook", "model"] = "codebook"
    """Width of what the MLP returns. ``codebook``: that of code vectors (section 3.2), 2.1, 2.1 and 2.6 M parameters at
    widths 768, 768 and 1024 with 256 channels. ``model``: that of hidden states, 3.1, 3.1 and 4.2 M, the overhead that
    the paper prints; code vectors are then compared in a fixed space of that width into which an isometry takes
    them."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over tokens. Eq. 6 prints the sum, under which ``weight`` would have to be about 1 / 256 for Table 3, which finds
    0.5, 1 and 1.5 alike."""

    @property
    def counted(self) -> bool:
        """Yes."""
        return True

    def layers(self, depth: int) -> dict[str, str]:
        """The hidden states that are read of ``depth`` blocks: name of their tap by "encoding", "decoding".

        Raises:
            ValueError: there is no such layer, or none at all.
        """
        wanted = {"encoding": self.encoding, "decoding": self.decoding}
        if self.decoding == "three_quarters":
            wanted["decoding"] = depth * 3 // 4
        shift = 1 if self.encoding_zero == "first_block" else 0
        found = {}
        for kind, layer in wanted.items():
            if layer is None:
                continue
            assert isinstance(layer, int)
            number = layer + (shift if kind == "encoding" else 0)
            if number > depth:
                raise ValueError(f"{kind}={layer} asks for block {number}, but the generator has {depth}")
            found[kind] = f"block.{number - 1}" if number else "embedding"
        if not found:
            raise ValueError("neither encoding nor decoding names a layer")
        return found

    def parameters(self, width: int, channels: int) -> int:
        """Scalars that it adds to a generator of ``width``, with code vectors of ``channels``; biases included."""
        result = channels if self.output == "codebook" else width
        both = self.encoding is not None and self.decoding is not None
        return ((width + 1) * self.hidden + (self.hidden + 1) * result) * (2 if both and not self.shared else 1)
