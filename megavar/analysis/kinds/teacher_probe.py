"""k nearest neighbours and a linear probe on features of teachers, as one measures self-supervised networks (DINO).

    f(x)   = mean over patches of the teacher's features, or all pixels
    k-NN   : most frequent class among the k training images of largest cosine
    probe  : ridge regression to the classes, one against all; its penalty by leave-one-out on the training images
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from megavar.analysis.base import Analysis, Report, Subject
from megavar.assembly import load_teacher, trained_choice
from megavar.config.analyses.teacher_probe import TeacherProbeAnalysis
from megavar.config.choice import resolve
from megavar.config.root import Config
from megavar.config.teachers.base import TeacherChoice
from megavar.data.build import build_source, build_transform, of_images
from megavar.data.pixels import to_float
from megavar.data.reading import stored_images
from megavar.data.source import Split
from megavar.errors import ConfigError
from megavar.parallel.logical import initialize_parameters
from megavar.transformer.defaults import usual_initial_value

PENALTIES = np.logspace(-2, 4, 7)
RANDOM, PIXELS = "random weights", "pixels"


class TeacherProbe(Analysis[TeacherProbeAnalysis]):
    """Teachers of several runs beside each other, on the data of the first."""

    def look(self, runs: Sequence[Subject]) -> Report:
        """Classify."""
        config, device = runs[0].config, runs[0].device
        networks: dict[str, Any] = {}
        for run in runs:
            for name, choice in teachers_of(run).items():
                networks.setdefault(name, load_teacher(choice, device))
        first = next(iter(teachers_of(runs[0]).values()))
        networks[RANDOM] = _untrained(first, device)
        images = {split: self._images(config, split) for split in ("train", "test")}
        classes = build_source(of_images(config.data)).num_classes
        values = {}
        for name, network in (networks | {PIXELS: None}).items():
            (known, labels), (asked, wanted) = (self._features(network, *images[split], device) for split in images)
            values[name] = accuracies(known, labels, asked, wanted, self.choice.neighbours)
        lines = [f"{name}: {found['knn']:.3f} by {self.choice.neighbours} neighbours, {found['probe']:.3f} by a linear "
                 f"probe" for name, found in values.items()]  # fmt: skip
        counts = {f"{split}_images": len(labels) for split, (_, labels) in images.items()} | {"classes": classes}
        lines.append("; ".join(f"{name.replace('_', ' ')}: {number}" for name, number in counts.items()))
        report = Report(next(iter(values.values())), values | counts, {}, {"": _draw(values, classes)})
        return replace(report, text="\n".join(lines))

    def _images(self, config: Config, split: Split) -> tuple[Tensor, Tensor]:
        """uint8 [N, 3, H, W] and int64 [N], without augmentation."""
        source = build_source(of_images(config.data), split)
        if not source.num_classes:
            raise ConfigError(f"The data of {config.run.name} have no classes: there is nothing to probe.")
        wanted = self.choice.train_images if split == "train" else self.choice.test_images
        transform = build_transform(config.data, "test")
        return stored_images(source, transform, range(min(wanted, len(source))), config.data.damaged_samples)

    @torch.no_grad()
    def _features(
        self, network: Any, images: Tensor, labels: Tensor, device: torch.device
    ) -> tuple[np.ndarray, np.ndarray]:
        """[N, D] and [N]; of no network: the pixels."""
        parts = []
        for batch in images.split(self.choice.batch):
            given = to_float(batch).to(device)
            parts.append((given.flatten(1) if network is None else network.features(given).mean(1)).cpu())
        return torch.cat(parts).numpy(), labels.numpy()


def teachers_of(run: Subject) -> dict[str, TeacherChoice]:
    """What the run distils, or the teachers of its terms, by their names in pictures.

    Raises:
        ConfigError: it has none.
    """
    recipe = run.config.recipe
    if recipe.trains == "teacher":
        made = trained_choice(run.config)
        assert isinstance(made, TeacherChoice)
        return {run.name: made.model_copy(update={"weights": str(run.directory)})}
    found = [teacher for term in getattr(recipe, "terms", ()) for teacher in term.teachers]
    if not found:
        raise ConfigError(
            f"The run {run.name} neither distils a teacher (recipe.name=self_distillation) nor has a term with one "
            f"(recipe.terms)."
        )
    return {f"{teacher.name} ({teacher.weights})": teacher for teacher in found}


def accuracies(
    known: np.ndarray, labels: np.ndarray, asked: np.ndarray, wanted: np.ndarray, neighbours: int
) -> dict[str, float]:
    """Shares of right classes.

    Args:
        known: features [N, D] of images of classes ``labels`` [N].
        asked: features of images whose classes ``wanted`` are guessed.
        neighbours: k.
    """
    near = KNeighborsClassifier(min(neighbours, len(labels)), metric="cosine")
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
    return {
        name: float(model.fit(known, labels).score(asked, wanted)) for name, model in (("knn", near), ("probe", probe))
    }


def _untrained(choice: TeacherChoice, device: torch.device) -> Any:
    network = resolve(choice)(choice)
    initialize_parameters(network, usual_initial_value, seed=0)
    return network.eval().requires_grad_(False).to(device)


def _draw(values: dict[str, dict[str, float]], classes: int) -> Figure:
    figure = Figure(figsize=(7, 1.6 + 0.6 * len(values)), layout="constrained")
    axes, places = figure.subplots(), np.arange(len(values))
    for shift, (kind, label) in enumerate((("knn", "nearest neighbours"), ("probe", "linear probe"))):
        shares = [found[kind] for found in values.values()]
        axes.bar_label(axes.barh(places + 0.38 * shift, shares, 0.36, label=label), fmt="%.3f", padding=3)
    axes.axvline(1 / classes, color="black", linestyle="--", linewidth=1, label="chance")
    axes.set(title="Test images whose class is found from the mean feature", xlabel="share", xlim=(0, 1.1))
    axes.set_yticks(places + 0.19, list(values))
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower right")
    return figure
