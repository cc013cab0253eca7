"""megavar: a large-scale distributed trainer for visual autoregressive image generators.

    import megavar
    model = megavar.load("runs/mepa-d16")              # a run, a checkpoint of it, or an exported file
    drawn = model.sample(classes=[207], guidance=1.5, number=8, seed=0)
    drawn.images[0].save("retriever.png")              # PIL images; drawn.tokens: [8, L]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megavar.library.loading import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``load``, imported when it is used: login nodes import megavar without torch."""
    if name == "load":
        from megavar.library.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
