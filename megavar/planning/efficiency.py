"""Sizes of a run that others ask for: what utilization in its log is measured in, and how much is trained."""

from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.planning.measure import Request, UnmeasurableError, measure, release, tokenizer_cost
from megavar.planning.passes import work_of
from megavar.planning.timing import step_flops


def flops_per_image(config: Config) -> float | None:
    """Model FLOPs per trained image, forward and backward, over all passes of a step.

    The frozen tokenizer's encoder is not counted. While a tokenizer is trained, its autoencoder is counted but not the
    discriminator or the perceptual network.

    Returns:
        None where the model cannot be measured: the reason is printed, and a run of it goes on without utilization.
    """
    if config.recipe.trains == "teacher":
        return None
    try:
        if config.generator is None:
            tokenizer = tokenizer_cost(config.tokenizer)
            return 3 * (tokenizer.encode_flops + tokenizer.decode_flops)
        (cost,) = measure([Request(config.generator, config.tokenizer.space, terms=config.recipe.counted_terms)])
        work = work_of(config.recipe, config.generator, config.tokenizer.space)
    except UnmeasurableError as error:
        print(f"Utilization will not be shown. {error}", flush=True)
        return None
    finally:
        release()
    return step_flops(cost, work)


def trained_parameters(config: Config) -> int:
    """Scalars of the generator, or of the tokenizer that is trained.

    Raises:
        UnmeasurableError: the model cannot be run without values.
    """
    if config.generator is None:
        return tokenizer_cost(config.tokenizer).parameters
    (cost,) = measure([Request(config.generator, config.tokenizer.space, terms=config.recipe.counted_terms)])
    return cost.parameters(ParallelConfig(), 0).total
