"""Where samples come from and how they are prepared."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megavar.config.base import PathText, Section
from megavar.config.secret import secret_in
from megavar.config.shapes import ShapesSource
from megavar.config.text import TextConfig


class DigitsSource(Section):
    """1797 handwritten digits in ten classes, bundled with scikit-learn. ``image_size`` must be a multiple of 8."""

    name: Literal["digits"] = "digits"


class PhotographsSource(Section):
    """Square crops of ten bundled colour photographs; class = photograph, training and test regions are disjoint."""

    name: Literal["photographs"] = "photographs"
    length: int = Field(4096, ge=1)
    """Number of training crops. The collection is fixed: crop i is the same in every epoch."""
    test_length: int = Field(1024, ge=1)
    """Number of test crops."""
    short_side: int = Field(256, ge=0)
    """Pixels to which the shorter side of each photograph is resized before cropping; 0 keeps the original size."""
    seed: int = 0
    """Chooses the places of the crops."""


class ImageFolderSource(Section):
    """A folder with one sub-folder of images per class."""

    name: Literal["image_folder"] = "image_folder"
    path: PathText
    """Folder of the training images."""
    test_path: PathText | None = None
    """Folder of the test images, with the same class folders."""
    test_share: float | None = Field(None, gt=0, lt=1)
    """Share of every class that is held out of ``path`` as test images, in the place of ``test_path``. Which ones
    follows from their paths alone; of two or more images of a class at least one is held out and one is trained on."""
    one_class: bool = False
    """The images lie in the folder itself and below it, and are one class named after it."""

    @model_validator(mode="after")
    def _one_place_of_test_images(self) -> "ImageFolderSource":
        if self.test_path is not None and self.test_share is not None:
            raise ValueError("test_path and test_share both say which images are held out: give one")
        return self


class WebDatasetSource(Section):
    """A folder of WebDataset shards made, or given an index and a manifest, by ``tools/shard_images.py``."""

    name: Literal["webdataset"] = "webdataset"
    path: PathText
    """Folder of the training shards."""
    test_path: PathText | None = None
    """Folder of the test shards; they are always read by index."""
    order: Literal["index", "stream"] = "index"
    """``index``: random access, a new random order of all samples in every epoch. ``stream``: shards are read from
    first to last sample, for object stores and pipes. Both give every world size the same global batches."""
    url: str | None = None
    """Where ``stream`` reads shards, with ``{shard}`` for the file name, for example
    ``pipe:aws s3 cp s3://bucket/train/{shard} -``. Default: ``path``, which must hold the manifest in any case."""
    @field_validator("url")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and (found := secret_in(value)) is not None:
            raise ValueError(
                f"{found} in it looks like a secret, which config.yaml would keep in clear. Let the command read it: "
                f"`pipe:curl -u \"$USER:$PASSWORD\" ...`, or a file such as ~/.netrc"
            )
        return value

    caption_key: str | None = Field(None, min_length=1)
    """Key of the captions in the samples' ``.json`` members (dots lead into nested objects), where the tars of another
    tool were indexed with ``tools/shard_images.py --existing DIR --captions json``. Default: captions are ``.txt``."""
    lanes: int = Field(8, ge=1)
    """Shards that ``stream`` reads side by side, over all ranks. It divides the global batch, and the data-parallel
    ranks divide it; changing it changes the order of samples."""


class PairsSource(Section):
    """Images with captions: ``name.jpg`` beside ``name.txt`` or ``name.json``, or a list of both."""

    name: Literal["pairs"] = "pairs"
    path: PathText
    """A folder, or a ``.jsonl`` file of ``{"image": path, "caption": text}`` lines, or a ``.json`` file with a list of
    such objects (VGT's: ``annotation``, the path of a JSON file, in the place of ``caption``)."""
    test_path: PathText | None = None
    """The same of test images."""
    caption_key: str = Field("caption", min_length=1)
    """Key of the captions in JSON files; dots lead into nested objects."""


ImagesConfig = Annotated[
    DigitsSource | PhotographsSource | ShapesSource | ImageFolderSource | WebDatasetSource | PairsSource,
    Field(discriminator="name"),
]


class MixtureSource(Section):
    """Several sources as one, each with its share of every batch in the long run.

    VGT is trained on 27 M, 5 M and 4 M pairs of three collections (``configs/vgt/base_data_pretraining.yaml``).
    """

    name: Literal["mixture"] = "mixture"
    sources: Annotated[tuple[ImagesConfig, ...], Field(min_length=1, strict=False)]
    """What is mixed: pairs, or sources with the same classes; shards by index."""
    weights: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Samples of each source in every block of as many as their sum; whole numbers, best without a common divisor.
    Default: all samples are one collection, so that each source has the share of its size."""

    @model_validator(mode="after")
    def _fits(self) -> "MixtureSource":
        if self.weights is not None and len(self.weights) != len(self.sources):
            raise ValueError(f"weights has {len(self.weights)} numbers for {len(self.sources)} sources: give one each")
        if self.weights is not None and (min(self.weights) < 1 or sum(self.weights) > 100_000):
            raise ValueError("weights are whole numbers from 1 on whose sum is at most 100000: divide them, or round")
        for number, source in enumerate(self.sources):
            if isinstance(source, WebDatasetSource) and source.order == "stream":
                raise ValueError(f"sources.{number} is a stream, which offers no single samples: use order: index")
        return self


class CacheSource(Section):
    """Token ids or encoder features made by ``tools/cache_tokens.py`` from images.

    ``data.image_size`` and ``data.transform`` say how they were made from the images and must stay the same."""

    name: Literal["cache"] = "cache"
    path: PathText
    """Folder of the cache of the training samples."""
    content: Literal["tokens", "latents"] = "tokens"
    """``tokens``: the tokenizer's ids. ``latents``: what it encodes to, for recipes whose scales change in every step
    (FlexVAR, SAR) and for tokenizers without ids."""
    views: int = Field(1, ge=1)
    """Augmented versions of each sample, one of which is chosen in each epoch. The ten-crop transform has 10; for
    transforms with continuous randomness 8 to 16 are reasonable; without randomness there is 1."""
    features: PathText | None = None
    """Folder of a teacher's features of the same views (``tools/cache_tokens.py CONFIG --teacher``), for terms that
    compare with them. None: the teacher looks at every image again, which needs images as the source."""
    images: ImagesConfig
    """The images that are cached; test images, and the captions of text-image pairs, always come from there."""


class TokenFileSource(Section):
    """Token ids as RAR's authors publish them: a text file, one JSON object ``{"class_id": 207, "tokens": [...]}`` per
    line (``maskgitvq.jsonl``). An epoch goes over all lines, ten of which are the ten crops of an image."""

    name: Literal["token_file"] = "token_file"
    path: PathText
    """The file. Where its lines begin is kept beside it (``NAME.index.npy``, ``NAME.index.json``)."""
    classes: int = Field(1000, ge=1)
    """Number of classes, which the file does not say."""
    images: ImagesConfig | None = None
    """The images of which the file was made: test images come from there."""


SourceConfig = Annotated[
    DigitsSource
    | PhotographsSource
    | ShapesSource
    | ImageFolderSource
    | WebDatasetSource
    | PairsSource
    | MixtureSource
    | CacheSource
    | TokenFileSource,
    Field(discriminator="name"),
]


class NoTransform(Section):
    """Images are used as stored; they must have ``image_size`` already."""

    name: Literal["none"] = "none"


class VarTransform(Section):
    """VAR: shorter side to ``round(resize * image_size)`` (Lanczos), random crop. Test: centre crop of the same."""

    name: Literal["var"] = "var"
    resize: float = Field(1.125, ge=1.0)
    """Shorter side before cropping, relative to ``image_size``."""
    flip: bool = False
    """Mirror half of the images. VAR's published models were trained without."""


class AdmRandomCropTransform(Section):
    """FlexVAR and SAR: mirror, then ADM's random crop that covers ``minimum_share`` to all of the shorter side.

    Test: ADM's centre crop.
    """

    name: Literal["adm_random_crop"] = "adm_random_crop"
    minimum_share: float = Field(0.88, gt=0.0, le=1.0)
    """Smallest share of the shorter side that a crop covers."""
    flip: bool = True
    """Mirror half of the images."""


class AdmCenterCropTransform(Section):
    """ADM's centre crop, as in MAR, DiT, REPA and the reference statistics of FID."""

    name: Literal["adm_center_crop"] = "adm_center_crop"
    flip: bool = False
    """Mirror half of the training images."""


class TenCropTransform(Section):
    """RAR, reAR and LlamaGen: four corners and centre of ADM's centre crop and of its mirror image, one at random.

    Test: ADM's centre crop.
    """

    name: Literal["ten_crop"] = "ten_crop"
    resize: float = Field(1.1, ge=1.0)
    """Size of the centre crop from which the ten views are cut, relative to ``image_size`` (rounded down)."""


class TitokTransform(Section):
    """TiTok and VGT-AE: shorter side to ``image_size`` (bicubic), random crop, mirror. Test: centre crop, no mirror."""

    name: Literal["titok"] = "titok"
    random_crop: bool = True
    """Off: centre crop, as in RAR's online variant."""
    flip: bool = True
    """Mirror half of the images."""


class SquareCropTransform(Section):
    """VGT text-to-image: the largest square at a random place, resized (bicubic). Test: the central square."""

    name: Literal["square_crop"] = "square_crop"


TransformConfig = Annotated[
    NoTransform
    | VarTransform
    | AdmRandomCropTransform
    | AdmCenterCropTransform
    | TenCropTransform
    | TitokTransform
    | SquareCropTransform,
    Field(discriminator="name"),
]


class DataConfig(Section):
    """Training and test data."""

    source: SourceConfig = DigitsSource()
    """Where samples come from."""
    image_size: int = Field(16, ge=1)
    """Height and width in pixels of the images that models see."""
    transform: TransformConfig = NoTransform()
    """Resize, crop and mirror; each is exactly that of a reference implementation."""
    text: TextConfig | None = None
    """How captions become token ids, for generators that read text; None: captions stay text."""
    workers: int = Field(0, ge=0, le=256)
    """Processes per rank that read and decode; 0 reads in the training process (right for small sources)."""
    prefetch: int = Field(4, ge=1, le=1024)
    """Micro-batches that each worker process prepares ahead."""
    damaged_samples: Literal["fail", "skip-and-count"] = "fail"
    """A sample that cannot be read or decoded ends the run, or its place is taken by another sample of the source.

    The stand-in is a function of (seed, epoch, index), hence the same for any number of ranks, is named in the log
    together with the damaged sample, and is counted in the metrics."""
