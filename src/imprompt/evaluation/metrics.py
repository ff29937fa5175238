"""Metrics computed from features and embeddings: similarity, diversity, identity, and distances between sets of images.

Nothing is opened here. Features of any type and from any device are computed on the CPU in float64. The encoder that gave them, and
how images were resized for it, change every value: print them next to it.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprompt.utils.statistics import to_float64

_KERNEL_BLOCK = 512  # rows of a kernel matrix at once: 2 MB, which stays in the cache


# Image by image


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise cosine similarity of two sets of embeddings. (n, width) twice → (n,), −1 … 1, higher is more similar.

    Of a generated image and its reference: CLIP-I, DINO (DreamBooth, arXiv:2208.12242), or identity with a face encoder. Of an
    image and its prompt: CLIP-T, here neither scaled nor clamped; CLIPScore (arXiv:2104.08718) is max(2.5 cos, 0), torchmetrics'
    is max(100 · mean cos, 0). Raises ValueError for different shapes.
    """
    a, b = _check_pair(a, b, "(n, width)")
    return F.cosine_similarity(a, b, dim=1)


def pairwise_diversity(features: Tensor) -> Tensor:
    """Diversity of the samples of one prompt: mean 1 − cosine over their pairs. (prompts, samples, width) → (prompts,).

    0 … 2, in practice 0 … 1. Higher is more diverse, which is good only together with a high similarity to the reference: noise is
    diverse too. LPIPS diversity (BicycleGAN, arXiv:1711.11586) with cosines in place of LPIPS. Raises ValueError for one sample.
    """
    unit = F.normalize(to_float64(features, "(prompts, samples, width)"), dim=2)
    num_samples = unit.shape[1]
    if num_samples < 2:
        raise ValueError(f"diversity needs at least 2 samples of a prompt, received {num_samples}")
    cosines = unit @ unit.mT  # (prompts, samples, samples)
    mean = (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (num_samples * (num_samples - 1))
    return (1 - mean).clamp(min=0)


def self_similarity_matrix(features: Tensor) -> Tensor:
    """S_ij = cos(k_i, k_j), the similarity of an image's patches to each other. (…, patches, width) → (…, patches, patches).

    Splice, arXiv:2201.00424: with the keys of DINO's last layer it describes an image's layout and not its appearance.
    """
    unit = F.normalize(features.detach().cpu().double(), dim=-1)
    return unit @ unit.mT


def self_similarity_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance between the layouts of two images: mean (S_a − S_b)². (n, patches, width) twice → (n,), 0 … 4.

    Lower preserves the layout better. Splice, arXiv:2201.00424, names the Frobenius norm ‖S_a − S_b‖; its code, and
    the tables of those who report it (mostly × 1000), use the mean square ‖S_a − S_b‖² / patches², as is done here.
    The features must not include the class token. Raises ValueError for different shapes.
    """
    a, b = _check_pair(a, b, "(n, patches, width)")
    distances = [(self_similarity_matrix(x) - self_similarity_matrix(y)).square().mean() for x, y in zip(a, b, strict=True)]
    return torch.stack(distances) if distances else torch.zeros(0, dtype=torch.float64)


# Identity


def identity_centroid(gallery: Tensor, detected: Tensor) -> Tensor:
    """Mean identity embedding of one subject's real images, at unit length. (images, width), (images,) → (width,).

    Images in which no identity was detected are left out; zeros, which are similar to no embedding, where none is left. Raises
    ValueError for shapes that do not fit.
    """
    gallery = to_float64(gallery, "(images, width)")
    if detected.shape != gallery.shape[:1]:
        raise ValueError(f"expected detected of shape ({len(gallery)},), received {tuple(detected.shape)}")
    return F.normalize(F.normalize(gallery[detected.cpu()], dim=1).sum(0), dim=0)


def identity_similarity(generated: Tensor, detected: Tensor, gallery: Tensor, gallery_detected: Tensor) -> Tensor:
    """Cosine similarity of generated images to the centroid of their subject's real images. (n, width), (n,) → (n,).

    −1 … 1, higher is more similar. nan where no identity was detected in the generated image, or in any real one: print that
    share next to the mean of the rest, which alone rewards images without a face. The scale differs between encoders: print
    next to it what real images of the same subject, and of others, reach.
    """
    generated = to_float64(generated, "(n, width)")
    centroid = identity_centroid(gallery, gallery_detected)
    return (F.normalize(generated, dim=1) @ centroid).masked_fill(~detected.cpu() | ~centroid.any(), math.nan)


def rank1_identification(generated: Tensor, subjects: Tensor, centroids: Tensor) -> Tensor:
    """Rank-1 identification: whether an image is more similar to its own subject than to every other. (n, width), (n,) → (n,) bool.

    `subjects` holds each image's index into `centroids`, (subjects, width). The mean is 1 / subjects by chance and 1
    at best; it falls as subjects are added, so print their number. A row of zeros, no identity detected, is not identified,
    nor is a subject that another equals. Raises ValueError below 2 subjects.
    """
    generated, centroids = to_float64(generated, "(n, width)"), to_float64(centroids, "(subjects, width)", min_rows=2)
    subjects = subjects.cpu()[:, None]
    cosines = F.normalize(generated, dim=1) @ F.normalize(centroids, dim=1).mT  # (n, subjects)
    best_other = cosines.scatter(1, subjects, -math.inf).max(1).values
    has_embedding = generated.any(1) & centroids.any(1)[subjects[:, 0]]
    return has_embedding & (cosines.gather(1, subjects)[:, 0] > best_other)


class VerificationThreshold(NamedTuple):
    """The cosine above which two images count as one subject, and the proportion of same-subject pairs above it, 0 … 1."""

    value: float
    true_accept_rate: float


def verification_threshold(same: Tensor, different: Tensor, false_accept_rate: float = 0.01) -> VerificationThreshold:
    """Verification: the lowest cosine that at most `false_accept_rate` of the pairs of different subjects exceed. (pairs,), (pairs,).

    Use cosines of real images, and for `different` the pairs that matter: with look-alikes the threshold is higher. Raises
    ValueError where there are too few different pairs for one of them to be that share.
    """
    same, different = to_float64(same, "(pairs,)", min_rows=1), to_float64(different, "(pairs,)")
    if not 0 < false_accept_rate < 1 or len(different) * false_accept_rate < 1:
        raise ValueError(
            f"expected a rate below 1 and at least 1 / rate different pairs, received {false_accept_rate} and {len(different)} pairs"
        )
    num_accepted = int(len(different) * false_accept_rate + 1e-9)  # 300 · 0.01 is a little less than 3
    value = float(different.sort(descending=True).values[num_accepted])
    return VerificationThreshold(value, float((same > value).double().mean()))


# Set against set


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of two Gaussians: ‖μ_r − μ_g‖² + Tr(Σ_r + Σ_g − 2 (Σ_r Σ_g)^½). (m, width), (n, width); 0 …, lower is better.

    arXiv:1706.08500, equation 6, computed by torchmetrics; it is FID with the features of Inception-v3 and with no others. It falls as
    images are added, below some 10 000 steeply: compare only equal numbers, print the number, and show the kernel distance and CMMD
    next to it. Raises ValueError below 2 rows.
    """
    real, generated = _check_two_sets(real, generated)
    center = real.mean(0)  # the distance does not change, but large means cost digits
    real, generated = real - center, generated - center
    if len(real) + len(generated) < real.shape[1]:  # rotated into the subspace that the rows span, which changes no distance either
        basis = torch.linalg.qr(torch.cat([real, generated]).mT).Q
        real, generated = real @ basis, generated @ basis
    with _isolated_torchmetrics(0):
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=_PassThrough(real.shape[1]), sync_on_compute=False)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        return max(float(metric.compute()), 0.0)


def kernel_distance(real: Tensor, generated: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """Kernel distance: unbiased MMD² with k(x, y) = (x·y / width + 1)³. (m, width), (n, width); lower is better.

    arXiv:1801.01401, computed by torchmetrics; it is KID with the features of Inception-v3 and with no others. The mean over random
    subsets, the same for the same seed; not scaled, tables mostly print it × 100 or × 1000. Where a set has fewer rows than
    `subset_size`, subsets are as large as the smaller set. Raises ValueError below 2 rows.

    Around 0 for independent sets of one distribution, and then negative as often as not. Below 0 for paired sets, such as an image
    set and itself: the estimator leaves k(x, x) out within each set, but not k(x, y) of an image and its partner between them.
    """
    real, generated = _check_two_sets(real, generated)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"the kernel distance needs at least 1 subset of at least 2 rows, received {subsets} of {subset_size}")
    size = min(subset_size, len(real), len(generated))
    if size == len(real) == len(generated):
        subsets = 1  # all would be the same
    with _isolated_torchmetrics(seed):
        from torchmetrics.image.kid import KernelInceptionDistance

        metric = KernelInceptionDistance(feature=_PassThrough(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        return float(metric.compute()[0])


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> float:
    """Inception Score: exp(E_x KL(p(y|x) ‖ p(y))). (n, classes) → 1 … classes, higher is better.

    arXiv:1606.03498, computed by torchmetrics: the mean over random splits, the same for the same seed. Takes a
    classifier's logits; logarithms of probabilities are logits too. It uses no real images, and falls where a split has few
    rows: print their number and the splits. A split keeps at least 2 rows, so few rows make fewer splits. Raises ValueError below 2 rows.
    """
    logits = to_float64(logits, "(n, classes)", min_rows=2)
    if splits < 1:
        raise ValueError(f"the Inception Score needs at least 1 split, received {splits}")
    splits = min(splits, len(logits) // 2)
    while len(logits) % -(-len(logits) // splits) == 1:  # torchmetrics cuts like torch.chunk, which may leave a last row alone
        splits -= 1
    logits = logits.log_softmax(1).clamp(min=-700)  # keeps probabilities above 0, of which torchmetrics would make nan
    with _isolated_torchmetrics(seed):
        from torchmetrics.image.inception import InceptionScore

        metric = InceptionScore(feature=_PassThrough(logits.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(logits)
        return float(metric.compute()[0])


def clip_mmd(real: Tensor, generated: Tensor, *, unbiased: bool = True) -> float:
    """CLIP-MMD (CMMD): 1000 · MMD² of unit-length embeddings, k(x, y) = exp(−‖x − y‖² / 2σ²), σ = 10. Lower is better.

    (m, width), (n, width). arXiv:2401.09603, the unbiased estimate: around 0 for sets of one distribution,
    and then negative as often as not. The authors' code also compares each row with itself, which `unbiased=False` repeats;
    that adds some 10 / m + 10 / n at most, nothing at their 30 000 images but not at hundreds. Published numbers use
    CLIP ViT-L/14 at 336 pixels. Memory stays flat. Raises ValueError below 2 rows.
    """
    real, generated = (F.normalize(x, dim=1) for x in _check_two_sets(real, generated))

    def sum_of_distances(x: Tensor, y: Tensor) -> float:
        """Σ 1 − k(x, y): the ones, which would cost digits, cancel among the three means. Zero for a row and itself."""
        blocks = (torch.expm1((a @ b.mT - 1) / 10**2).sum() for a in x.split(_KERNEL_BLOCK) for b in y.split(_KERNEL_BLOCK))
        return -float(sum(blocks))

    m, n, excluded = len(real), len(generated), int(unbiased)
    within = sum_of_distances(real, real) / (m * (m - excluded)) + sum_of_distances(generated, generated) / (n * (n - excluded))
    return 1000 * (2 * sum_of_distances(real, generated) / (m * n) - within)


# What torchmetrics needs


class _PassThrough(nn.Module):
    """Takes the place of torchmetrics' Inception network: the inputs are features already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """The features."""
        return features


@contextmanager
def _isolated_torchmetrics(seed: int) -> Iterator[None]:
    """Random numbers of its own for torchmetrics, which uses the global generator, and without warnings that do not apply."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs too
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom is <= 0", category=UserWarning)  # of a single split
        yield


def _check_pair(a: Tensor, b: Tensor, shape: str) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"expected two tensors of one shape {shape}, received {tuple(a.shape)} and {tuple(b.shape)}")
    return to_float64(a, shape), to_float64(b, shape)


def _check_two_sets(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    real, generated = to_float64(real, "(m, width)", min_rows=2), to_float64(generated, "(n, width)", min_rows=2)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"expected features of one width, received {real.shape[1]} (real) and {generated.shape[1]} (generated)")
    return real, generated
