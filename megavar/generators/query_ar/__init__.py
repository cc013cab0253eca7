"""QueryAR of VGT: a language model draws by answering queries of positions."""

from megavar.generators.query_ar.model import QueryAR

__all__ = ["QueryAR"]
