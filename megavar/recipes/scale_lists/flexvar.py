"""FlexVAR: a random list in every step (jiaosiyu1999/FlexVAR ``trainer.py``, ``gen_curr_patch_nums``).

1 in 20  : the tokenizer's list
else     : 1, 2, five of 3..10, two of 11..15, 16
one draw : in 10 % drop an inner scale, in 5 % a second, in 2 % a third, in 1 % a fourth
too long : drop one of the last four, until it fits
"""

import functools
import random

from megavar.config.scale_lists.flexvar import FlexVARScaleLists
from megavar.errors import ConfigError
from megavar.recipes.ranks import data_parallel_rank


class RandomLists:
    """A function of (seed, step), or with ``per: rank`` of (seed, step, data-parallel rank)."""

    def __init__(self, choice: FlexVARScaleLists, usual: tuple[int, ...], seed: int) -> None:
        """See :class:`megavar.recipes.scale_lists.base.ScaleLists`.

        Raises:
            ConfigError: the tokenizer's last scale leaves too few sides to draw from.
        """
        self.choice, self.usual, self.seed = choice, usual, seed
        last = usual[-1]
        if choice.fine > last - choice.fine_from:
            raise ConfigError(
                f"recipe.scale_lists draws {choice.fine} sides between {choice.fine_from} and {last - 1}, below the "
                f"tokenizer's last scale {last}. Lower recipe.scale_lists.fine or fine_from."
            )
        self.shared = choice.per == "step"
        self.of_step = functools.lru_cache(maxsize=8)(self._of_step)

    @property
    def all_sides(self) -> tuple[int, ...]:
        """Up to the tokenizer's last one."""
        return tuple(range(1, self.usual[-1] + 1))

    def _of_step(self, step: int) -> tuple[int, ...]:
        rank = "" if self.shared else f"/{data_parallel_rank()}"
        return self.draw(random.Random(f"scale_lists/{self.seed}/{step}{rank}"))

    def draw(self, source: random.Random) -> tuple[int, ...]:
        """One list. The order of the draws is the released code's."""
        choice, last = self.choice, self.usual[-1]
        if source.random() < choice.usual_share:
            sides = list(self.usual)
        else:
            coarse = source.sample(range(3, choice.fine_from), choice.coarse)
            fine = source.sample(range(choice.fine_from, last), choice.fine)
            sides = [1, 2, *sorted(coarse + fine), last]
        fate = source.random()
        for share in choice.dropped:
            if fate > 1 - share and len(sides) > 3:
                sides.pop(source.choice(range(2, len(sides) - 1)))
        while sum(side * side for side in sides) > choice.longest and len(sides) > 1:
            sides.pop(source.choice(range(max(len(sides) - 4, 1), len(sides))))
        return tuple(sides)
