"""The suite ``adm``."""

from typing import ClassVar, Literal

from megavar.config.base import PathText
from megavar.config.suites.base import SuiteChoice


class ADMSuite(SuiteChoice):
    """FID, sFID, Inception score, precision and recall as ADM's evaluator computes them."""

    implementation: ClassVar[str] = "megavar.evaluation.suites.adm:ADM"

    name: Literal["adm"] = "adm"
    inception_weights: PathText
    """Path of ``weights-inception-2015-12-05-6726825d.pth`` (torch-fidelity's release v0.2.0)."""
    unofficial_weights: bool = False
    """Accept other weights of the same layout; the metrics then carry the start of their sha256."""
    reference: PathText
    """ADM's npz, statistics (``mu``, ``sigma``), or a file of ``tools/evaluate_fid.py reference``."""
    backend: Literal["megavar", "torch-fidelity"] = "megavar"
    """Whose formulas: ours, or torch-fidelity's for FID, IS, precision and recall on the same features."""
