"""VAR: always the tokenizer's scales."""

from megavar.config.scale_lists.fixed import FixedScaleLists


class Fixed:
    """One list for all steps."""

    shared = True

    def __init__(self, choice: FixedScaleLists, usual: tuple[int, ...], seed: int) -> None:
        self.all_sides = usual

    def of_step(self, step: int) -> tuple[int, ...]:
        """The tokenizer's."""
        return self.all_sides
