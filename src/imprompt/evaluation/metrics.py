"""Figures over features: how like, how varied, how far apart two sets are, and how sure one may be of it.

Nothing is opened here. Features come in of any type and from any device; everything is computed on the CPU in float64. Which
encoder gave them, and how pictures were resized for it, changes every figure: say so beside it.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK = 512  # rows of a kernel matrix at once: 2 MB, which stays in the cache
_DRAWS = 2**22  # groups drawn at once in a vectorised bootstrap, 32 MB


# Picture by picture


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise cosines of two sets of embeddings. (n, width) twice → (n,), −1 … 1, higher is more alike.

    Of a drawn picture and its reference: CLIP-I, DINO (DreamBooth, arXiv:2208.12242), or identity with a face encoder. Of a
    picture and its text: CLIP-T, here neither scaled nor clamped; CLIPScore (arXiv:2104.08718) is max(2.5 cos, 0), torchmetrics'
    max(100 · mean cos, 0).
    """
    a, b = _pair(a, b, "(n, width)")
    return F.cosine_similarity(a, b, dim=1)


def diversity(features: Tensor) -> Tensor:
    """How much the samples of one prompt differ: mean 1 − cosine over their pairs. (prompts, samples, width) → (prompts,).

    0 … 2, in practice 0 … 1. Higher is more varied, which is good only beside a good likeness: noise is varied too. The
    measure is LPIPS diversity's (BicycleGAN, arXiv:1711.11586) with cosines for LPIPS.
    One sample has no pair: ValueError.
    """
    unit = F.normalize(_checked(features, "(prompts, samples, width)"), dim=2)
    samples = unit.shape[1]
    if samples < 2:
        raise ValueError(f"diversity needs at least 2 samples of a prompt, received {samples}")
    alike = unit @ unit.mT  # (prompts, samples, samples)
    mean = (alike.sum((1, 2)) - alike.diagonal(dim1=1, dim2=2).sum(1)) / (samples * (samples - 1))
    return (1 - mean).clamp(min=0)


def self_similarity(features: Tensor) -> Tensor:
    """S_ij = cos(k_i, k_j): how each patch of a picture resembles the others. (…, patches, width) → (…, patches, patches).

    Splice, arXiv:2201.00424: with the keys of DINO's last layer it tells a picture's layout and not its looks.
    """
    unit = F.normalize(features.detach().cpu().double(), dim=-1)
    return unit @ unit.mT


def structure_distance(a: Tensor, b: Tensor) -> Tensor:
    """How far the layouts of two pictures lie apart: mean (S_a − S_b)². (n, patches, width) twice → (n,), 0 … 4.

    Lower keeps the layout better. Splice, arXiv:2201.00424, names the Frobenius norm ‖S_a − S_b‖; its code, and
    the tables of those who report it (mostly × 1000), take the mean square ‖S_a − S_b‖² / patches², as is done here.
    The features of the class token are to be left out.
    """
    a, b = _pair(a, b, "(n, patches, width)")
    found = [(self_similarity(x) - self_similarity(y)).square().mean() for x, y in zip(a, b, strict=True)]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


# Who it is


def centroid(gallery: Tensor, found: Tensor) -> Tensor:
    """Whom several real photographs show: the mean of their embeddings, at length 1. (photographs, width), (photographs,) → (width,).

    Photographs in which nobody was found are left out; zeros, which resemble nobody, where none is left.
    """
    gallery = _checked(gallery, "(photographs, width)")
    if found.shape != gallery.shape[:1]:
        raise ValueError(f"expected found of shape ({len(gallery)},), received {tuple(found.shape)}")
    return F.normalize(F.normalize(gallery[found.cpu()], dim=1).sum(0), dim=0)


def likeness(drawn: Tensor, found: Tensor, gallery: Tensor, gallery_found: Tensor) -> Tensor:
    """Identity: cosines of drawn pictures with the centroid of their subject's real photographs. (n, width), (n,) → (n,).

    −1 … 1, higher is more alike. nan where nobody was found in the drawn picture, or in any photograph: print that
    share beside the mean of the rest, which alone rewards drawing nobody. The scale differs between encoders: print beside
    it what real photographs of the same subject, and of others, reach.
    """
    drawn = _checked(drawn, "(n, width)")
    whom = centroid(gallery, gallery_found)
    return (F.normalize(drawn, dim=1) @ whom).masked_fill(~found.cpu() | ~whom.any(), math.nan)


def recognised(drawn: Tensor, which: Tensor, centroids: Tensor) -> Tensor:
    """Rank-1 identification: whether a picture is nearer to its own subject than to every other. (n, width), (n,) → (n,) bool.

    `which` is each picture's subject among `centroids`, (subjects, width). The mean is 1 / subjects by chance and 1
    at best; it falls as subjects are added, so print their count. A row of zeros, nobody found, is not recognised,
    nor is a subject that another equals. ValueError below 2 subjects.
    """
    drawn, centroids = _checked(drawn, "(n, width)"), _checked(centroids, "(subjects, width)", least=2)
    which = which.cpu()[:, None]
    alike = F.normalize(drawn, dim=1) @ F.normalize(centroids, dim=1).mT  # (n, subjects)
    others = alike.scatter(1, which, -math.inf).max(1).values
    known = drawn.any(1) & centroids.any(1)[which[:, 0]]
    return known & (alike.gather(1, which)[:, 0] > others)


class Threshold(NamedTuple):
    """The cosine above which two pictures count as one subject, and the share of true pairs that do."""

    value: float
    accepted: float


def threshold(same: Tensor, different: Tensor, rate: float = 0.01) -> Threshold:
    """Verification: the lowest cosine that at most `rate` of the pairs of different subjects exceed. (pairs,), (pairs,).

    Take cosines of real photographs, and for `different` the pairs that matter: against look-alikes the threshold is higher.
    `accepted`, 0 … 1 and higher is better, is the true accept rate at this false accept rate. ValueError where there
    are too few different pairs for one of them to be `rate` of them.
    """
    same, different = _checked(same, "(pairs,)", least=1), _checked(different, "(pairs,)")
    if not 0 < rate < 1 or len(different) * rate < 1:
        raise ValueError(f"expected a rate below 1 and at least 1 / rate different pairs, received {rate} and {len(different)} pairs")
    allowed = int(len(different) * rate + 1e-9)  # 300 · 0.01 is a little less than 3
    value = float(different.sort(descending=True).values[allowed])
    return Threshold(value, float((same > value).double().mean()))


# Set against set


def fid(real: Tensor, drawn: Tensor) -> float:
    """Fréchet Inception Distance: ‖μ_r − μ_d‖² + Tr(Σ_r + Σ_d − 2 (Σ_r Σ_d)^½). (m, width), (n, width); 0 …, lower is better.

    arXiv:1706.08500, equation 6, computed by torchmetrics. It falls as pictures are added, below some 10 000 steeply: compare
    only equal counts, print the count, and show KID and CMMD beside it. ValueError below 2 rows.
    """
    real, drawn = _two_sets(real, drawn)
    centre = real.mean(0)  # the distance does not change, but large means cost digits
    real, drawn = real - centre, drawn - centre
    if len(real) + len(drawn) < real.shape[1]:  # nor does it where both are turned into the space that their rows span
        basis = torch.linalg.qr(torch.cat([real, drawn]).mT).Q
        real, drawn = real @ basis, drawn @ basis
    with _torchmetrics(0):
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), sync_on_compute=False)
        metric.update(real, real=True)
        metric.update(drawn, real=False)
        return max(float(metric.compute()), 0.0)


def kid(real: Tensor, drawn: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """Kernel Inception Distance: unbiased MMD² with k(x, y) = (x·y / width + 1)³. (m, width), (n, width); lower is better.

    arXiv:1801.01401, computed by torchmetrics: the mean over random subsets, the same for the same seed. Around 0
    where the sets are alike, and then negative as often as not. Not scaled; tables mostly print it × 100 or × 1000.
    Where a set has fewer rows than `subset_size`, subsets are as large as the smaller set. ValueError below 2 rows.
    """
    real, drawn = _two_sets(real, drawn)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"KID needs at least 1 subset of at least 2 rows, received {subsets} of {subset_size}")
    size = min(subset_size, len(real), len(drawn))
    if size == len(real) == len(drawn):
        subsets = 1  # all would be the same
    with _torchmetrics(seed):
        from torchmetrics.image.kid import KernelInceptionDistance

        metric = KernelInceptionDistance(feature=_Given(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False)
        metric.update(real, real=True)
        metric.update(drawn, real=False)
        return float(metric.compute()[0])


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> float:
    """Inception Score: exp(E_x KL(p(y|x) ‖ p(y))). (n, classes) → 1 … classes, higher is better.

    arXiv:1606.03498, computed by torchmetrics: the mean over random splits, the same for the same seed. Takes a
    classifier's logits; logarithms of probabilities are logits too. It knows no real pictures, and falls where a split has few
    rows: print count and splits. A split keeps at least 2 rows, so few rows make fewer splits. ValueError below 2 rows.
    """
    logits = _checked(logits, "(n, classes)", least=2)
    if splits < 1:
        raise ValueError(f"the Inception Score needs at least 1 split, received {splits}")
    splits = min(splits, len(logits) // 2)
    while len(logits) % -(-len(logits) // splits) == 1:  # torchmetrics cuts like torch.chunk, which may leave a last row alone
        splits -= 1
    logits = logits.log_softmax(1).clamp(min=-700)  # no probability becomes 0, of which torchmetrics would make nan
    with _torchmetrics(seed):
        from torchmetrics.image.inception import InceptionScore

        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(logits)
        return float(metric.compute()[0])


def cmmd(real: Tensor, drawn: Tensor, unbiased: bool = True) -> float:
    """CLIP-MMD: 1000 · MMD² of unit-length embeddings, k(x, y) = exp(−‖x − y‖² / 2σ²), σ = 10. Lower is better.

    (m, width), (n, width). arXiv:2401.09603, the unbiased estimate: around 0 where the sets are alike,
    and then negative as often as not. The authors' code also compares each row with itself, which `unbiased=False` repeats;
    that adds some 10 / m + 10 / n at most, nothing at their 30 000 pictures but not at hundreds. Published numbers are of
    CLIP ViT-L/14 at 336 pixels. Memory stays flat. ValueError below 2 rows.
    """
    real, drawn = (F.normalize(x, dim=1) for x in _two_sets(real, drawn))

    def lack(x: Tensor, y: Tensor) -> float:
        """Σ 1 − k(x, y): the ones, which would cost digits, cancel among the three means. Zero for a row and itself."""
        parts = (torch.expm1((a @ b.mT - 1) / 10**2).sum() for a in x.split(_BLOCK) for b in y.split(_BLOCK))
        return -float(sum(parts))

    m, n, less = len(real), len(drawn), int(unbiased)
    within = lack(real, real) / (m * (m - less)) + lack(drawn, drawn) / (n * (n - less))
    return 1000 * (2 * lack(real, drawn) / (m * n) - within)


# How sure


class Interval(NamedTuple):
    """A figure and where it would mostly lie if other prompts of the same kind had been taken."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Tensor], float | Tensor], groups: Tensor, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap over groups: of medians, shares, ratios, and other figures that are the same with every row doubled.

    `statistic` takes the numbers of the chosen rows, a LongTensor in which rows come repeatedly, and gives the figure. `groups`,
    (n,), names each row's prompt: samples of a prompt resemble one another, so whole prompts are drawn, with replacement.
    Not for FID, KID, CMMD and the Inception Score: repeated rows make a set look poorer than it is, and the whole interval moves
    away from the value; take `jackknife`. For means `mean_interval` is faster. ValueError for fewer than 2 groups.
    """
    members = _members(groups)
    tail = _tail(level, resamples)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(members), (len(members),), generator=generator).tolist() for _ in range(resamples))
    found = torch.tensor([float(statistic(torch.cat([members[g] for g in draw]))) for draw in draws], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(statistic(torch.arange(len(groups)))), low, high)


def mean_interval(values: Tensor, groups: Tensor, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """`bootstrap` of the mean over all rows, at once. values, groups: (n,).

    Two contenders over the same rows are compared by the mean of their differences: `mean_interval(a − b, groups)`, much
    narrower than either alone. Below some 20 groups a percentile interval is a little too narrow. ValueError for fewer than 2.
    """
    values = _checked(values, "(n,)")
    if values.shape != groups.shape:
        raise ValueError(f"expected a group for each value, received {len(values)} values and groups of shape {tuple(groups.shape)}")
    members = _members(groups)
    tail = _tail(level, resamples)
    sums = torch.stack([values[m].sum() for m in members])
    counts = torch.tensor([len(m) for m in members], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in torch.arange(resamples).split(max(_DRAWS // len(members), 1)):
        drawn = torch.randint(len(members), (len(part), len(members)), generator=generator)  # (resamples, groups)
        found.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = torch.cat(found).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def jackknife(
    statistic: Callable[[Tensor], float | Tensor], groups: Tensor, folds: int = 20, seed: int = 0, level: float = 0.95
) -> Interval:
    """Jackknife over blocks of groups: for FID, KID, CMMD and the Inception Score. value ± t √((K − 1)/K Σ (θ_k − θ̄)²).

    θ_k is the figure without the k-th of K `folds`, into which whole groups (prompts) are dealt at random; t is Student's for
    K − 1 degrees of freedom. `statistic` takes the numbers of the rows that stay, ascending; what else it looks at, such as the
    real pictures, counts as fixed. ValueError for fewer than 2 groups.

    Why no bootstrap: a resample holds only 63 % of the rows, some repeatedly. FID then sees a smaller set, KID and CMMD compare
    rows with their copies; all rise, and a percentile interval with them: FID's may not even hold the value. Leaving rows out
    repeats none, costs K evaluations instead of thousands, and its variance errs upwards on average (Efron and Stein 1981). On
    Gaussians of 40 to 200 prompts it held the truth in 90 to 95 % of cases, the bootstrap's in 42 to 92 %.

    The interval is for the figure at this count of prompts, as printed: it does not take away FID's bias. Where the figure draws
    subsets (KID with `subset_size` below n, the Inception Score's splits) their chance is counted as well and widens it: give
    `subset_size=n` and `splits=1` here.
    """
    members = _members(groups)
    tail = _tail(level, folds)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for k in range(min(folds, len(members))):
        stays = torch.ones(len(groups), dtype=torch.bool)
        stays[torch.cat([members[g] for g in order[k::folds]])] = False
        found.append(float(statistic(stays.nonzero()[:, 0])))
    spread = math.sqrt((len(found) - 1) * float(torch.tensor(found, dtype=torch.float64).var(correction=0)))
    value, reach = float(statistic(torch.arange(len(groups)))), _student(1 - tail, len(found) - 1) * spread
    return Interval(value, value - reach, value + reach)


def _student(share: float, freedom: int) -> float:
    """The quantile of Student's t, from the normal one (Abramowitz and Stegun 26.7.5): within 1 % from 3 degrees of freedom."""
    z = NormalDist().inv_cdf(share)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**i for i, term in enumerate(terms))


def _members(groups: Tensor) -> list[Tensor]:
    """The rows of each group."""
    if groups.ndim != 1:
        raise ValueError(f"expected groups as (n,), received {tuple(groups.shape)}")
    _, counts = groups.cpu().unique(return_counts=True)
    if len(counts) < 2:
        raise ValueError(f"an interval needs rows of at least 2 groups (prompts), received {len(counts)}")
    return list(groups.cpu().argsort(stable=True).split(counts.tolist()))


def _tail(level: float, repeats: int) -> float:
    """What lies beyond the interval on either side."""
    if not 0 < level < 1 or repeats < 2:
        raise ValueError(f"expected a level between 0 and 1 and at least 2 resamples or folds, received {level} and {repeats}")
    return (1 - level) / 2


# What torchmetrics needs


class _Given(nn.Module):
    """Stands where torchmetrics has its Inception network: what comes in are features already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextmanager
def _torchmetrics(seed: int) -> Iterator[None]:
    """Random numbers of our own for torchmetrics, which draws from everyone's, and silence about what we know."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs too
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom is <= 0", category=UserWarning)  # of a single split
        yield


def _checked(features: Tensor, shape: str, least: int = 0) -> Tensor:
    """On the CPU in float64, of as many dimensions as `shape` names and at least so many rows."""
    if features.ndim != len(shape.strip("(,)").split(",")):
        raise ValueError(f"expected features of shape {shape}, received {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"expected at least {least} rows, received {len(features)}")
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        raise ValueError("features hold nan or infinite values; leave those rows out, or encode in float32")
    return features


def _pair(a: Tensor, b: Tensor, shape: str) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"expected two tensors of one shape {shape}, received {tuple(a.shape)} and {tuple(b.shape)}")
    return _checked(a, shape), _checked(b, shape)


def _two_sets(real: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    real, drawn = _checked(real, "(m, width)", least=2), _checked(drawn, "(n, width)", least=2)
    if real.shape[1] != drawn.shape[1]:
        raise ValueError(f"expected features of one width, received {real.shape[1]} (real) and {drawn.shape[1]} (drawn)")
    return real, drawn
