"""Configurations to start from: a tokenizer and a generator whose sizes fit a folder of images and the machine."""

from dataclasses import dataclass

import torch
import yaml

from megavar.data.survey import Survey

TOKENIZER_FILE, GENERATOR_FILE = "{name}-tokenizer.yaml", "{name}.yaml"
SUITE_IMAGES = 64
"""Fewest training images with which a classifier of the classes says anything."""
HELD_OUT_FOR_BASELINES = 16
"""Fewest held-out images whose scores stand beside the model's (``megavar.evaluation.classes``)."""


@dataclass(frozen=True)
class Size:
    """Model and length for images of one size."""

    scales: tuple[int, ...]
    multipliers: tuple[int, ...]
    """Channels of the tokenizer's levels, relative to ``channels``; all but the first halve the resolution."""
    channels: int
    vocabulary: int
    depth: int
    width: int
    heads: int
    steps: tuple[int, int]
    """Of tokenizer and generator."""
    batch: tuple[int, int]


SIZES = {
    16: Size((1, 2, 4), (1, 2, 2), 16, 128, 4, 96, 4, (600, 800), (32, 64)),
    32: Size((1, 2, 4, 8), (1, 2, 2), 16, 256, 4, 96, 4, (500, 500), (16, 32)),
    64: Size((1, 2, 3, 4, 6, 8), (1, 1, 2, 4), 32, 1024, 8, 256, 8, (10_000, 20_000), (64, 128)),
    128: Size((1, 2, 3, 4, 6, 8), (1, 1, 2, 2, 4), 64, 2048, 12, 512, 8, (20_000, 40_000), (64, 256)),
    256: Size((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 1, 2, 2, 4), 96, 4096, 16, 1024, 16, (40_000, 80_000), (32, 256)),
}
"""By image side. 16 and 32 pixels take minutes on two CPU cores, the others a GPU and hours to days."""


@dataclass(frozen=True)
class Start:
    """What ``megavar init`` writes."""

    found: Survey
    name: str
    size: int
    held_out: float
    on_gpu: bool

    @classmethod
    def fitting(cls, found: Survey, *, name: str, size: int | None, held_out: float) -> "Start":
        """What fits ``found`` and this machine; ``size`` where a person says it."""
        gpu = torch.cuda.is_available()
        possible = [side for side in SIZES if side <= found.short_side and (gpu or side <= 32)]
        return cls(found, name, size or max(possible, default=min(SIZES)), held_out, gpu)

    @property
    def chosen(self) -> Size:
        """Sizes of the model."""
        return SIZES[self.size]

    @property
    def tokens(self) -> int:
        """Of an image."""
        return sum(side * side for side in self.chosen.scales)

    @property
    def scored(self) -> bool:
        """Whether there is something to tell a good model by."""
        return len(self.found.classes) > 1 and self.found.count - self.found.held_out >= SUITE_IMAGES

    @property
    def scored_by(self) -> str:
        """In words."""
        if self.scored:
            return "a classifier of these classes, trained on the spot (suite `classifier`), beside baselines"
        return "nothing but the validation loss: scores need two classes or more, and 64 images"

    @property
    def held_out_for(self) -> str:
        """In words: losses are taken over whole batches, scores compared with as many as there are."""
        uses = ["the validation loss"] * bool(self._validation(*self._generator)) + ["scores"] * self.scored
        return " and ".join(uses) or f"a validation loss, once there are {self._generator[1]} of them"

    @property
    def _generator(self) -> tuple[int, int]:
        """Steps and batch."""
        return self.chosen.steps[1], self.chosen.batch[1]

    @property
    def notes(self) -> list[str]:
        """What a person should know of these choices."""
        notes = []
        if not self.on_gpu and self.size > 32:
            notes.append(f"{self.size} pixels are for a GPU: on this machine add --size 32 first")
        if self.found.short_side < self.size:
            notes.append(f"most images are smaller than {self.size} pixels and will be enlarged")
        if self.found.count < 500:
            notes.append("few images: expect them to be remembered rather than varied")
        return notes

    def tokenizer(self) -> str:
        """The file of the tokenizer's run, with what both runs share."""
        own, chosen = self.found, self.chosen
        source = {"name": "image_folder", "path": str(own.root), "test_share": self.held_out}
        steps, batch = chosen.steps[0], chosen.batch[0]
        tree = {
            "run": {"name": f"{self.name}-tokenizer"},
            "recipe": {"name": "tokenizer",
                       "codebook": {"revive_every": 20, "revive_until": steps * 4 // 5, "dead_below": 0.2,
                                    "usage_decay": 0.95}},
            "data": {"source": source | ({"one_class": True} if own.one_class else {}), "image_size": self.size,
                     "transform": {"name": "var", "flip": True}}
            | ({"workers": 4} if self.on_gpu else {})
            | ({"damaged_samples": "skip-and-count"} if own.damaged else {}),
            "tokenizer": {
                "name": "multiscale_vq", "scales": list(chosen.scales), "vocabulary_size": chosen.vocabulary,
                "code_dimension": 16, "refinement_count": min(4, len(chosen.scales)), "base_channels": chosen.channels,
                "channel_multipliers": list(chosen.multipliers), "residual_blocks": 1 if self.size <= 32 else 2,
                "norm_groups": 8, "lowest_level_attention": self.size > 32, "middle_attention": self.size > 32,
            },
            "train": {"steps": steps, "global_batch_size": batch, "checkpoint": {"interval": max(100, steps // 10)}}
            | self._machine,
            "optimizer": {"lr": 2.0e-3 if self.size <= 32 else 2.0e-4, "betas": [0.9, 0.99], "weight_decay": 0.0,
                          "gradient_clipping": 1.0,
                          "schedule": {"name": "cosine", "warmup_steps": max(20, steps // 100), "final_lr": 2.0e-5}},
            "deepspeed": "configs/deepspeed/zero0.json",
            "logging": self._logging(steps),
        }  # fmt: skip
        return self._text(f"Images of {own.root} to tokens and back: trained first, by {self.name}.yaml.", tree)

    def generator(self) -> str:
        """The file of the generator's run."""
        chosen, (steps, batch) = self.chosen, self._generator
        samples = min(1000, max(100, 20 * len(self.found.classes)))
        suite = {"name": "classifier", "reference_images": min(4096, max(64, self.found.count)),
                 "baselines": self.found.held_out >= HELD_OUT_FOR_BASELINES}  # fmt: skip
        tree = {
            "run": {"name": self.name, "requires": [TOKENIZER_FILE.format(name=self.name)]},
            "recipe": {"name": "mepa", "tokenizer_weights": f"runs/{self.name}-tokenizer"},
            "generator": {"name": "var", "depth": chosen.depth, "width": chosen.width, "heads": chosen.heads,
                          "classes": len(self.found.classes), "drop_path": 0.05,
                          "experts": {"number": 8, "top_k": 3, "router": "scale_token"}},
            "train": {"steps": steps, "global_batch_size": batch, "checkpoint": {"interval": max(100, steps // 10)}},
            "optimizer": {"lr": 2.0e-3 if self.size <= 32 else 4.0e-4, "betas": [0.9, 0.95], "weight_decay": 0.05,
                          "gradient_clipping": 2.0,
                          "schedule": {"name": "lin0"}},
            "logging": self._logging(steps),
            "validation": self._validation(steps, batch),
            "sampling": {"number": samples, "chunk_size": 50, "guidance": 1.5, "top_k": 0, "top_p": 0.0},
            "evaluation": {"suite": suite, "after_training": True} if self.scored else {},
        }  # fmt: skip
        text = f"Draws images like those of {self.found.root}."
        shared = {key: value for key, value in tree.items() if value != {}}
        return self._text(text, {"base": TOKENIZER_FILE.format(name=self.name)} | shared)

    @property
    def _machine(self) -> dict[str, object]:
        return {"precision": "bf16"} if self.on_gpu else {"cpu_threads": 1}

    def _validation(self, steps: int, batch: int) -> dict[str, object]:
        """On at most eight batches of what is held out, where that is a batch at all."""
        batches = min(8, self.found.held_out // batch)
        return {"interval": max(10, steps // 20), "samples": batches * batch} if batches else {}

    @staticmethod
    def _logging(steps: int) -> dict[str, object]:
        return {"interval": 10, "samples_interval": max(50, steps // 10), "wandb": {"mode": "disabled"}}

    def _text(self, comment: str, tree: dict[str, object]) -> str:
        lines = f"# {comment} Written by `megavar init`; every key is documented in megavar/config.\n"
        return lines + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
