"""What features of teachers know of classes (docs/teachers.md)."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.analyses.base import AnalysisChoice


class TeacherProbeAnalysis(AnalysisChoice):
    """Classes of test images from the mean patch feature: nearest neighbours and a linear probe.

    Of a run that distils a teacher, or of the teachers of a run's terms; beside them the same network with random
    weights, and the pixels.
    """

    implementation: ClassVar[str] = "megavar.analysis.kinds.teacher_probe:TeacherProbe"

    kind: Literal["teacher_probe"] = "teacher_probe"
    train_images: int = Field(4096, ge=2)
    """Training images whose classes are known, from the first on; at most as many as there are."""
    test_images: int = Field(1024, ge=1)
    """Test images whose classes are guessed; at most as many as there are."""
    batch: int = Field(64, ge=1)
    """Images at a time."""
    neighbours: int = Field(20, ge=1)
    """k of the nearest neighbours by cosine, each with one vote (DINO's protocol has 20 with weights)."""
