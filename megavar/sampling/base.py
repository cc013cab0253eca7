"""What a decoding procedure is: from conditions and noise to the tokens of images.

To add one, write a class with :meth:`Procedure.draw` whose constructor takes its configuration section, and a
``SamplingChoice`` that names it (``sampling: {procedure: ...}``). It may demand more of the generator than
:class:`megavar.generators.base.Generator` offers to all, and more of the tokenizer than
:class:`megavar.tokenizers.base.Tokenizer`: it says so by a protocol of its own, as :mod:`.procedures.next_scale` does.
Guidance, truncation and the draw itself are in :mod:`.guidance`, :mod:`.filters` and :mod:`.noise`.
"""

from typing import Any, Protocol

from torch import Tensor

from megavar.conditions import Condition
from megavar.sampling.noise import Noise


class Procedure(Protocol):
    """Draws the tokens of B samples.

    A sample may depend on its own condition and noise only: neither on the other samples of the batch nor on
    ``torch``'s generators. There should be no synchronization with the device per step.
    """

    def draw(self, generator: Any, tokenizer: Any, condition: Condition, noise: Noise | None) -> Tensor:
        """Draw.

        Args:
            generator: the whole model on one rank, in evaluation mode.
            tokenizer: frozen; it embeds what was drawn where the generator reads code vectors.
            condition: of the B samples.
            noise: of the B samples; None takes the most likely tokens (greedy).

        Returns:
            int64 [B, L] ids, or float32 [B, L, C] vectors of a continuous tokenizer.

        Raises:
            ConfigError: generator or tokenizer cannot be decoded by this procedure.
        """
        ...
