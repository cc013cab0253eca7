"""Loss on samples that are never trained on."""

from pydantic import Field

from megavar.config.base import PathText, Section


class ValidationConfig(Section):
    """The recipe's losses, per scale where it has scales, on the same held-out samples each time: the first of the
    test split in the seed's order, in evaluation mode (no dropout, no drop path), with the condition drop of training.
    Random choices of a recipe (scales, noise) are those of the end of the run, and the same each time."""

    interval: int = Field(ge=1)
    """Steps between measurements, each at the next line of metrics (``logging.interval``); the last step is measured in
    any case."""
    samples: int = Field(ge=1)
    """Held-out samples; whole batches (``train.global_batch_size``) of them are taken, one at least, and computed as a
    training step is."""
    reference: PathText | None = None
    """A reference curve (``configs/tables/curves/*.json``, written by ``python -m tools.reference_curve``): status says
    whether the run is inside its band."""
