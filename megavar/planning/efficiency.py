"""What utilization in a run's log is measured in."""

from megavar.config.root import Config
from megavar.planning.measure import Request, measure
from megavar.planning.tokenizer_cost import tokenizer_cost


def flops_per_image(config: Config) -> float:
    """Model FLOPs per trained image, forward and backward.

    The frozen tokenizer's encoder is not counted. While a tokenizer is trained, its autoencoder is counted but not the
    discriminator or the perceptual network.

    Raises:
        UnmeasurableError: the generator cannot be run without values.
    """
    if config.generator is None:
        cost = tokenizer_cost(config.tokenizer)
        return 3 * (cost.encode_flops + cost.decode_flops)
    return measure([Request(config.generator, config.tokenizer.space)])[0].model_flops
