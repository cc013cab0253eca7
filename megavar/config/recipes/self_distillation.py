"""DINO's self-distillation (Caron et al. 2021, arXiv:2104.14294) of a small vision transformer."""

from typing import ClassVar, Literal

from pydantic import Field

from megavar.config.base import Section
from megavar.config.choice import Choice
from megavar.config.recipes.base import RecipeChoice
from megavar.config.teachers.self_distilled import SelfDistilledConfig, ViTConfig


class CropsConfig(Section):
    """Multi-crop: two large views, which student and teacher see, and small ones, which only the student sees."""

    global_scale: tuple[float, float] = (0.5, 1.0)
    """Share of the image's area that a large view covers (DINO: 0.4 to 1, of photographs)."""
    local_scale: tuple[float, float] = (0.2, 0.5)
    """Share that a small view covers (DINO: 0.05 to 0.4, which of a digit would leave nothing to see)."""
    local_number: int = Field(2, ge=0)
    """Small views (DINO: 8; 2 is enough for images of 16 pixels and costs less)."""
    local_side: int = Field(8, ge=1)
    """Side of a small view in pixels: half of a large one's, a multiple of the patch."""
    flip: bool = False
    """Mirror half of the views (DINO: yes; digits are not symmetric)."""
    brightness: float = Field(0.4, ge=0)
    """Views are multiplied by 1 plus or minus up to this (DINO's colour jitter: 0.4), about black."""
    contrast: float = Field(0.4, ge=0)
    """Differences from the view's mean are multiplied by 1 plus or minus up to this (DINO: 0.4)."""


class SelfDistillationConfig(RecipeChoice):
    """The student learns to say of each view what an average of itself says of another; no labels are used."""

    implementation: ClassVar[str] = "megavar.recipes.self_distillation:SelfDistillation"
    trains: ClassVar[Literal["generator", "tokenizer", "teacher"]] = "teacher"

    name: Literal["self_distillation"] = "self_distillation"
    network: ViTConfig = ViTConfig()
    """Sizes of the vision transformer."""
    crops: CropsConfig = CropsConfig()
    """Views of an image."""
    pooling: Literal["patches", "class"] = "patches"
    """What the projection head reads: the mean of the patches, whose features guide later, or DINO's class token."""
    prototypes: int = Field(256, ge=2)
    """Outputs of the projection head, K (DINO: 65536 for ImageNet)."""
    head_hidden: int = Field(128, ge=1)
    """Hidden width of the projection head's three layers (DINO: 2048)."""
    head_bottleneck: int = Field(32, ge=1)
    """Width before the prototypes, where outputs are normalized (DINO: 256)."""
    student_temperature: float = Field(0.1, gt=0)
    """DINO's."""
    teacher_temperature: float = Field(0.04, gt=0)
    """DINO's before warm-up."""
    centering: Literal["sinkhorn_knopp", "mean"] = "sinkhorn_knopp"
    """How the average is kept from saying the same of all images: ``sinkhorn_knopp`` shifts its logits so that the
    images of a step are spread evenly over the prototypes (SwAV, DINOv2; a forward-only pass asks it first); ``mean``
    subtracts a moving mean (DINO's Eq. 4, which collapses to the uniform answer in networks as small as these)."""
    koleo_weight: float = Field(1.0, ge=0)
    """Weight of KoLeo (DINOv2: 0.1): images' vectors move away from their nearest neighbours. Small networks begin with
    nearly the same vector for all images, so it is larger here. Needs ``sinkhorn_knopp``; 0 with ``mean``."""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the old centre that a step keeps (DINO's)."""
    average_momentum: float = Field(0.99, ge=0, lt=1)
    """Share of the old average of the weights that the first step keeps; rises to 1 with a cosine (DINO: 0.996 over
    tens of thousands of steps)."""

    def trained_choice(self) -> Choice:
        """The teacher that a run of it results in."""
        return SelfDistilledConfig(weights="", grid=self.network.grid, network=self.network)

    @property
    def views_of_image(self) -> tuple[float, float]:
        """Two large views and the small ones; the average sees the large ones, and once more the student (KoLeo)."""
        small = self.crops.local_number * (self.crops.local_side / (self.network.patch * self.network.grid)) ** 2
        return 2 + small, 4.0 if self.centering == "sinkhorn_knopp" else 2.0

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The heads, which are small beside the network."""
        return ("projection heads",)
