"""From the features of a row's images to its metrics, with confidence intervals and labels that name the model behind each."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imprompt.config.evaluation import MetricsConfig
from imprompt.evaluation import metrics
from imprompt.evaluation.identity import IdentityGallery
from imprompt.evaluation.store import RowStore
from imprompt.models.clip_score import CLIP_VIT_L, metric_with_model
from imprompt.utils.statistics import Interval, jackknife_interval, mean_interval

# Metric → how its values are read. Arrows: which way is better. {target}: what generated images are compared with.
METRICS = {
    "CLIP-I": "↑ cosine similarity to the {target}",
    "CLIP-T": "↑ cosine similarity to the caption (in a scale sweep: to the prompt used)",
    "feature cosine": "↑ cosine similarity to the {target}, of the features that the Fréchet distance uses",
    "self-sim. distance": "↓ distance of the patches' self-similarities to those of the {target} (Splice)",
    "LPIPS": "↓ to the {target}",
    "FD": "↓ Fréchet distance to the set of all {target}s; the fewer images, the higher, below some 10 000",
    "KD × 1000": "↓ kernel distance to the same set; ± includes the randomness of its subsets",
    "CMMD": "↓ to the same set",
    "IS": "↑ Inception Score, one split",
    "diversity": "↑ mean 1 − cosine among the samples of a prompt",
    "ID similarity": "↑ cosine similarity, by an identity encoder, to the subject's images that are no targets (a returned reference is "
    "one of them)",
    "rank-1 ID acc.": "↑ share of images whose most similar subject of all is their own",
    "detection failures": "↓ share of images in which the identity encoder detected none",
}
NEGATIVE_MARK = " †"
NEGATIVE_NOTE = (
    "† KD, KID and CMMD are unbiased estimates of a squared distance between independent sets, so values around zero can be negative. "
    "Here the sets are paired: every image belongs to one of the targets that it is compared with. The term between the sets contains "
    "these similar pairs and the terms within the sets do not, which pushes the estimate below zero, most of all for the row of the "
    "targets themselves. Read a negative value as no measurable distance, and compare rows with each other."
)

KD_SUBSET_SIZE = 1_000  # rows
MIN_GROUPS_FOR_DISTRIBUTIONS = 4  # prompts or subjects, one of which is left out at a time for the interval
MIN_IMAGES_FOR_DISTRIBUTIONS = 50  # on both sides: with fewer, distances of distributions are mostly bias

_PUBLISHED_CLIP_MODELS = {"CLIP-I": CLIP_VIT_L, "CLIP-T": CLIP_VIT_L, "CMMD": f"{CLIP_VIT_L}-336"}
_INCEPTION_LABELS = {"FD": "FID", "KD × 1000": "KID × 1000", "IS": "IS"}


def metric_label(metric: str, config: MetricsConfig) -> str:
    """The label of a metric, with the model that computed it: `CLIP-I (mini)`, `KD (mini) × 1000`, `FD (facebook/dinov2-base)`.

    Without the model only where it is the one that the name stands for in publications: CLIP ViT-L/14 for CLIP-I and CLIP-T, the
    same at 336 pixels for CMMD, and Inception-v3 for FID, KID and IS.
    """
    assert config.clip_model is not None and config.feature_extractor is not None
    if metric in _PUBLISHED_CLIP_MODELS:
        return metric_with_model(metric, config.clip_model, _PUBLISHED_CLIP_MODELS[metric])
    if metric not in _INCEPTION_LABELS:
        return metric
    if config.feature_extractor == "inception":
        return _INCEPTION_LABELS[metric]
    if config.feature_extractor == "clip":
        return metric_with_model(metric, config.clip_model).replace("(", "(CLIP ", 1)
    return metric_with_model(metric, config.feature_extractor)


def metric_of(label: str) -> str:
    """The metric, a key of METRICS, of a label."""
    metric = re.sub(r" \(.*\)", "", label)
    return {name: metric for metric, name in _INCEPTION_LABELS.items()}.get(metric, metric)


@dataclass(frozen=True)
class RowScore:
    """The metrics of one row."""

    name: str
    num_images: int
    num_prompts: int
    num_skipped: int  # prompts whose image could not be read
    trainable_params: int | None = None
    seconds_per_image: float = 0.0  # in one process
    scale: float = 1.0
    sweep_of: str = ""  # the row whose scale sweep this is a point of
    metrics: dict[str, Interval] = field(default_factory=dict)  # by label


class RowFeatures:
    """Features and scores of a row's images, from its chunks; the images themselves are not opened again."""

    def __init__(self, store: RowStore, num_chunks: int):
        self.store, self.num_chunks = store, num_chunks

    def column(self, name: str) -> Tensor | None:
        """One tensor over all chunks, or None where the evaluation does not compute it."""
        parts = [tensors[name] for tensors, _ in self._chunks() if name in tensors]
        return torch.cat(parts) if parts else None

    def __getitem__(self, name: str) -> Tensor:
        """The column of this name. Raises KeyError where there is none."""
        column = self.column(name)
        if column is None:
            raise KeyError(name)
        return column

    @property
    def skipped(self) -> dict[str, str]:
        """Index of each prompt that could not be evaluated → reason."""
        return {prompt: reason for _, skipped in self._chunks() for prompt, reason in skipped.items()}

    @property
    def generation_seconds(self) -> float:
        """The time that generating all images took."""
        return sum(float(tensors["generation_seconds"]) for tensors, _ in self._chunks() if tensors)

    def _chunks(self) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
        return (self.store.read_chunk(chunk) for chunk in range(self.num_chunks))


def compute_metrics(
    row: RowFeatures,
    targets: RowFeatures,
    config: MetricsConfig,
    *,
    num_samples: int,
    distribution_metrics: bool = True,
    gallery: IdentityGallery | None = None,
    by_subject: bool = False,
) -> dict[str, Interval]:
    """The metrics of a row by label; none for fewer than 2 groups. `targets`: the features of the target images.

    With `distribution_metrics` also those that compare whole sets of images, from MIN_IMAGES_FOR_DISTRIBUTIONS images on; with a gallery of
    subjects also identity. Intervals are over subjects with `by_subject`, otherwise over prompts.
    """
    groups = row["group" if by_subject else "prompt_index"]
    if len(groups.unique()) < 2:
        return {}
    scores = {name: values for name in METRICS if (values := row.column(f"score.{name}")) is not None}
    intervals = _mean_scores(scores, groups, config.bootstrap_samples)
    if num_samples > 1:
        diversity = metrics.pairwise_diversity(row["clip_embeds"].unflatten(0, (-1, num_samples)))
        intervals["diversity"] = mean_interval(diversity, groups[::num_samples], config.bootstrap_samples)
    if gallery is not None:
        intervals |= identity_metrics(row, gallery, groups, config.bootstrap_samples)
    num_images = min(len(groups), len(targets["prompt_index"]))
    has_enough = num_images >= MIN_IMAGES_FOR_DISTRIBUTIONS and len(groups.unique()) >= MIN_GROUPS_FOR_DISTRIBUTIONS
    if distribution_metrics and has_enough:
        intervals |= set_metrics(row, targets, groups)
    return {metric_label(name, config): interval for name, interval in intervals.items()}


def _mean_scores(scores: Mapping[str, Tensor], groups: Tensor, bootstrap_samples: int) -> dict[str, Interval]:
    """The mean of each score over the images that have it: there is no CLIP-T without a caption."""
    intervals = {}
    for name, values in scores.items():
        present = ~values.isnan()
        if len(groups[present].unique()) > 1:
            intervals[name] = mean_interval(values[present], groups[present], bootstrap_samples)
    return intervals


def set_metrics(row: RowFeatures, targets: RowFeatures, groups: Tensor) -> dict[str, Interval]:
    """Metrics of the row's whole set of images, compared with the targets of the prompts that it did not skip."""
    skipped = row.skipped
    is_evaluated = torch.tensor([str(prompt) not in skipped for prompt in targets["prompt_index"].tolist()])
    features, target_features = row["features"], targets["features"][is_evaluated]
    clip_embeds, target_embeds = row["clip_embeds"], targets["clip_embeds"][is_evaluated]
    size = min(len(target_features), KD_SUBSET_SIZE)

    def kernel_distance(rows: Tensor) -> float:
        return 1000 * metrics.kernel_distance(target_features, features[rows], subsets=20, subset_size=size)

    intervals = {
        "FD": jackknife_interval(lambda rows: metrics.frechet_distance(target_features, features[rows]), groups),
        "KD × 1000": jackknife_interval(kernel_distance, groups),
        "CMMD": jackknife_interval(lambda rows: metrics.clip_mmd(target_embeds, clip_embeds[rows]), groups, folds=10),
    }
    class_probs = row.column("class_probs")
    if class_probs is not None:
        logits = class_probs.clamp(min=1e-12).log()
        intervals["IS"] = jackknife_interval(lambda rows: metrics.inception_score(logits[rows], splits=1), groups)
    return intervals


def identity_metrics(row: RowFeatures, gallery: IdentityGallery, groups: Tensor, resamples: int) -> dict[str, Interval]:
    """Whether images show their subject. Without a detected identity an image is not identified, and has no similarity."""
    embeds, detected = row["id_embeds"], row["has_id_embed"]
    identified = metrics.rank1_identification(embeds, groups, gallery.centroids)
    intervals = {"rank-1 ID acc.": mean_interval(identified.double(), groups, resamples)}
    if not detected.all():
        intervals["detection failures"] = mean_interval((~detected).double(), groups, resamples)
    comparable = detected & gallery.has_embedding[groups]
    if len(groups[comparable].unique()) > 1:
        similarity = metrics.cosine_similarity(embeds[comparable], gallery.centroids[groups[comparable]])
        intervals["ID similarity"] = mean_interval(similarity, groups[comparable], resamples)
    return intervals
