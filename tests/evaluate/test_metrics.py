"""Every figure agrees with an implementation of its own, written otherwise; every interval holds what it promises."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from torch import nn

from imprompt.evaluation import metrics
from imprompt.evaluation.metrics import (
    bootstrap,
    cmmd,
    cosines,
    diversity,
    fid,
    inception_score,
    jackknife,
    kid,
    mean_interval,
    self_similarity,
    structure_distance,
)

close = pytest.approx


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_sets(m=200, n=150, width=12):
    """Gaussians of other means and covariances, with correlated columns."""
    return random(m, width) @ random(width, width, seed=1), 0.3 + random(n, width, seed=2) @ random(width, width, seed=3)


# Picture by picture


def test_cosines_against_numpy():
    a, b = random(20, 7), random(20, 7, seed=1)
    x, y = a.numpy(), b.numpy()
    wanted = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert cosines(a, b).numpy() == close(wanted, rel=1e-5)
    assert torch.allclose(cosines(a, -2 * a), -torch.ones(20).double())
    assert torch.allclose(cosines(a.half(), b.half()).float(), torch.from_numpy(wanted), atol=2e-3)
    assert cosines(a[:0], b[:0]).shape == (0,)


def test_diversity_against_scipy():
    features = random(5, 4, 9)
    wanted = [scipy.spatial.distance.pdist(prompt, "cosine").mean() for prompt in features.double().numpy()]
    assert diversity(features).numpy() == close(wanted)
    assert diversity(features[:1, :1].expand(1, 3, 9)).item() == close(0, abs=1e-12)
    assert diversity(torch.eye(3)[None]).item() == close(1)
    with pytest.raises(ValueError, match="at least 2 samples of a prompt, received 1"):
        diversity(features[:, :1])


def test_structure_against_loops():
    a, b = random(3, 6, 5), random(3, 6, 5, seed=1)

    def matrix(patches):
        return np.array([[1 - scipy.spatial.distance.cosine(p, q) for q in patches] for p in patches])

    wanted = [((matrix(x) - matrix(y)) ** 2).mean() for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert structure_distance(a, b).numpy() == close(wanted, rel=1e-4)
    assert self_similarity(a)[1].numpy() == close(matrix(a[1].numpy()), rel=1e-4)
    turned = torch.linalg.qr(random(5, 5, seed=2)).Q  # other features, the same layout
    assert structure_distance(a, 3 * a @ turned).max() == close(0, abs=1e-10)
    assert structure_distance(a[:0], b[:0]).shape == (0,)


def test_clip_t_against_torchmetrics_clip_score():
    """Theirs is 100 times the mean, and never below 0."""
    from transformers import CLIPProcessor

    from imprompt.mini import world
    from imprompt.models.clip_score import Similarity

    clip_score = pytest.importorskip("torchmetrics.functional.multimodal").clip_score
    subjects = [world.subject(i) for i in range(8)]
    images = [world.draw(s, world.scene(i)) for i, s in enumerate(subjects)]
    texts = [world.full_caption(s, world.scene(i)) for i, s in enumerate(subjects)]
    judge = Similarity.load("mini")

    class Plain(nn.Module):
        """torchmetrics 1.9 expects the embedding itself, as transformers gave it before 5."""

        config = judge.model.config

        def get_image_features(self, pixels):
            return judge.model.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, tokens, mask):
            return judge.model.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output

    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    theirs = CLIPProcessor(judge.processor, judge.tokenizer)
    for words in (texts, texts[::-1]):
        ours = cosines(judge.images(images), judge.texts(words)).mean().item()
        score = clip_score(tensors, words, lambda: (Plain(), theirs)).item()
        assert score == close(max(100 * ours, 0), rel=1e-4, abs=1e-4)


# Set against set


class Given(nn.Module):
    num_features = 12

    def forward(self, x):
        return x


def by_torchmetrics(metric, *updates):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = metric()
        for update in updates:
            made.update(*update)
        found = made.compute()
    return found[0].item() if isinstance(found, tuple) else found.item()


def fid_by_scipy(real, drawn):
    """By the definition: means, covariances, and the square root of a matrix."""
    real, drawn = real.double().numpy(), drawn.double().numpy()
    a, b = np.cov(real.T), np.cov(drawn.T)
    return ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


def test_fid_against_scipy_and_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, drawn = two_sets()
    assert fid(real, drawn) == close(fid_by_scipy(real, drawn), rel=1e-6)
    theirs = by_torchmetrics(lambda: FrechetInceptionDistance(feature=Given()), (real.double(), True), (drawn.double(), False))
    assert fid(real, drawn) == close(theirs, rel=1e-6)
    assert fid(real + 1e4, drawn + 1e4) == close(theirs, rel=1e-3)  # in float32 the features themselves lose digits there
    assert fid(real.double() + 1e6, drawn.double() + 1e6) == close(theirs, rel=1e-4)
    assert 0 <= fid(real, real) < 1e-4


def test_fid_with_fewer_pictures_than_features():
    real, drawn = two_sets(20, 30, 256)
    assert fid(real, drawn) == close(fid_by_scipy(real, drawn), rel=1e-4)
    assert fid(real[:2], drawn[:2]) == close(fid_by_scipy(real[:2], drawn[:2]), rel=1e-4)


def test_kid_against_numpy_and_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    real, drawn = two_sets(150, 150)
    x, y = real.double().numpy(), drawn.double().numpy()
    xx, yy, xy = ((a @ b.T / 12 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    wanted = ((xx.sum() - np.trace(xx)) + (yy.sum() - np.trace(yy))) / (150 * 149) - 2 * xy.mean()
    assert kid(real, drawn, subset_size=150) == close(wanted, rel=1e-6)
    assert kid(real, drawn) == close(wanted, rel=1e-6)  # 1000 are not there

    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = lambda: KernelInceptionDistance(feature=Given(), subsets=20, subset_size=40)  # noqa: E731
        theirs = by_torchmetrics(made, (real.double(), True), (drawn.double(), False))
    assert kid(real, drawn, subsets=20, subset_size=40, seed=7) == close(theirs, rel=1e-9)
    assert kid(real, drawn, subsets=20, subset_size=40, seed=8) != theirs
    assert kid(real, drawn[:60]) == kid(real, drawn[:60], subset_size=60)


def test_inception_score_against_numpy_and_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = 2 * random(90, 12)
    p = scipy.special.softmax(logits.double().numpy(), axis=1)
    wanted = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(logits, splits=1) == close(wanted, rel=1e-9)
    assert inception_score(torch.from_numpy(p).log(), splits=1) == close(wanted, rel=1e-9)
    theirs = by_torchmetrics(lambda: InceptionScore(feature=Given(), splits=1), (logits.double(),))
    assert inception_score(logits, splits=1) == close(theirs, rel=1e-9)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = by_torchmetrics(lambda: InceptionScore(feature=Given(), splits=10), (logits.double(),))
    assert inception_score(logits, seed=3) == close(theirs, rel=1e-9)
    assert inception_score(torch.eye(10) * 1e5, splits=1) == close(10)  # certain, and every class once
    assert inception_score(torch.ones(10, 10)) == close(1)
    assert inception_score(logits[:3]) == inception_score(logits[:3], splits=1)  # no split of a single row
    assert inception_score(logits[:7], splits=3) == inception_score(logits[:7], splits=2)


@pytest.mark.parametrize("unbiased", [True, False])
def test_cmmd_against_scipy(unbiased, monkeypatch):
    real, drawn = two_sets(90, 70)

    def mean_kernel(a, b, leave_out=False):
        a, b = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (a, b))
        k = np.exp(-scipy.spatial.distance.cdist(a, b, "sqeuclidean") / (2 * 10**2))
        return k[~np.eye(len(a), dtype=bool)].mean() if leave_out else k.mean()

    within = mean_kernel(real, real, unbiased) + mean_kernel(drawn, drawn, unbiased)
    wanted = 1000 * (within - 2 * mean_kernel(real, drawn))
    assert cmmd(real, drawn, unbiased) == close(wanted, rel=1e-8)
    monkeypatch.setattr(metrics, "_BLOCK", 16)
    assert cmmd(2 * real, drawn, unbiased) == close(wanted, rel=1e-8)


def test_cmmd_of_alike_sets_is_unbiased():
    found = [cmmd(random(30, 8, seed=i), random(40, 8, seed=1000 + i)) for i in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 200**0.5
    assert np.mean([cmmd(random(30, 8, seed=i), random(40, 8, seed=1000 + i), unbiased=False) for i in range(20)]) > 0.3


def test_cmmd_keeps_memory_flat():
    """8 000 rows against as many: one matrix of kernels would take 512 MB. In a process of its own, whose peak is its own."""
    code = """
import resource, torch
from imprompt.evaluation.metrics import cmmd
torch.set_num_threads(1)
x, y = torch.randn(8_000, 4), torch.randn(8_000, 4)
cmmd(x[:50], y[:50])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert abs(cmmd(x, y)) < 1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100  # MB


@pytest.mark.parametrize("figure", [lambda a, b: fid(a, b), lambda a, b: kid(a, b, 3, 20), lambda a, b: inception_score(a)])
def test_random_numbers_are_left_as_they_were(figure):
    real, drawn = two_sets()
    before = torch.get_rng_state()
    assert figure(real, drawn) == figure(real, drawn)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_measured_is_refused():
    real, drawn = two_sets()
    for figure in (fid, kid, cmmd):
        assert np.isfinite(figure(real[:2], drawn[:2]))
        for pair in ((real[:1], drawn), (real, drawn[:1])):
            with pytest.raises(ValueError, match="at least 2 rows, received 1"):
                figure(*pair)
        with pytest.raises(ValueError, match=r"received 12 \(real\) and 11 \(drawn\)"):
            figure(real, drawn[:, :11])
        with pytest.raises(ValueError, match="nan or infinite"):
            figure(real, drawn / 0)
        with pytest.raises(ValueError, match=r"shape \(m, width\), received \(200,\)"):
            figure(real[:, 0], drawn)
    with pytest.raises(ValueError, match="at least 2 rows"):
        inception_score(real[:1])
    with pytest.raises(ValueError, match=r"of one shape \(n, width\), received \(200, 12\) and \(150, 12\)"):
        cosines(real, drawn)
    with pytest.raises(ValueError, match="received 0 of 9"):
        kid(real, drawn, 0, 9)
    with pytest.raises(ValueError, match="at least 1 split"):
        inception_score(real, 0)


# How sure


def test_mean_interval_of_many_values_is_the_normal_one():
    values = random(2500) ** 2
    found = mean_interval(values, torch.arange(2500), resamples=6000)
    reach = 1.959964 * values.std().item() / 2500**0.5
    assert found.value == close(values.mean().item(), rel=1e-6)
    assert (found.low, found.high) == close((found.value - reach, found.value + reach), abs=0.05 * reach)
    assert mean_interval(values, torch.arange(2500)) == mean_interval(values, torch.arange(2500))
    narrow = mean_interval(values, torch.arange(2500), resamples=6000, level=0.5)
    assert narrow.high - narrow.low == close(2 * reach * 0.67449 / 1.959964, rel=0.1)


def test_mean_interval_against_scipy_bootstrap():
    values = random(60).double() ** 2
    found = mean_interval(values, torch.arange(60), resamples=20_000)
    theirs = scipy.stats.bootstrap((values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    width = theirs.high - theirs.low
    assert (found.low, found.high) == close((theirs.low, theirs.high), abs=0.03 * width)


def test_samples_of_one_prompt_count_together():
    """With correlation ρ within prompts of k samples, the variance of the mean is 1 + (k − 1) ρ times that of independent ones."""
    prompts, k, rho = 400, 4, 0.6
    values = (rho**0.5 * random(prompts, 1) + (1 - rho) ** 0.5 * random(prompts, k, seed=1)).flatten()
    groups = torch.arange(prompts).repeat_interleave(k)
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    together, apart = mean_interval(values, groups), mean_interval(values, torch.arange(len(values)))
    assert together.value == apart.value
    assert (together.high - together.low) / (apart.high - apart.low) == close((1 + (k - 1) * rho) ** 0.5, rel=0.12)
    mixed = mean_interval(values[shuffled], 7 * groups[shuffled] - 3)  # any numbers in any order name the groups
    assert mixed == close(together, rel=1e-9)


def test_bootstrap_of_a_mean_is_the_mean_interval(monkeypatch):
    values, groups = random(90), torch.arange(90) % 31  # groups of unequal size
    slow = bootstrap(lambda rows: values[rows].mean(), groups, resamples=4000)
    fast = mean_interval(values, groups, resamples=4000)
    assert slow.value == close(fast.value)
    assert (slow.low, slow.high) == close((fast.low, fast.high), abs=0.05 * (fast.high - fast.low))
    monkeypatch.setattr(metrics, "_DRAWS", 31 * 64)  # in parts
    parts = mean_interval(values, groups, resamples=4000)
    assert (parts.low, parts.high) == close((fast.low, fast.high), abs=0.05 * (fast.high - fast.low))
    median = bootstrap(lambda rows: values[rows].median(), groups)
    assert median.low < median.value < median.high


def test_jackknife_of_a_mean_is_students_interval():
    values = random(200)
    found = jackknife(lambda rows: values[rows].mean(), torch.arange(200), folds=200)
    theirs = scipy.stats.t.interval(0.95, 199, values.mean(), scipy.stats.sem(values))
    assert found == close((values.mean().item(), *theirs), rel=1e-4)
    few = jackknife(lambda rows: values[rows].mean(), torch.arange(5))  # fewer groups than folds
    assert few[1:] == close(scipy.stats.t.interval(0.95, 4, values[:5].mean(), scipy.stats.sem(values[:5])), rel=0.01)


def prompts_of(seed, prompts=40, k=4, width=16):
    """Drawn features, those of a prompt alike: in all a Gaussian of mean 0.4 and variance 1."""
    own, common = random(prompts, k, width, seed=2 * seed), random(prompts, 1, width, seed=2 * seed + 1)
    return (0.4 + 0.6**0.5 * common + 0.4**0.5 * own).flatten(0, 1)


@pytest.mark.parametrize(("figure", "missed"), [(fid, 0.7), (cmmd, 1.0)], ids=["fid", "cmmd"])
def test_jackknife_holds_what_the_bootstrap_misses(figure, missed):
    """The truth is the mean over many sets of prompts, at the same count."""
    real, groups = random(160, 16, seed=999_999), torch.arange(40).repeat_interleave(4)
    truth = np.mean([figure(real, prompts_of(i)) for i in range(1000, 1400)])

    def holds(interval, drawn, **how):
        found = interval(lambda rows: figure(real, drawn[rows]), groups, **how)
        return found.low <= truth <= found.high

    held = [holds(jackknife, prompts_of(i)) for i in range(100)]
    naive = [holds(bootstrap, prompts_of(i), resamples=60) for i in range(20)]
    assert 0.88 <= np.mean(held) <= 0.99
    assert np.mean(naive) <= missed


@pytest.mark.parametrize("interval", [bootstrap, jackknife])
def test_an_interval_needs_two_prompts(interval):
    with pytest.raises(ValueError, match=r"at least 2 groups \(prompts\), received 1"):
        interval(lambda rows: rows.double().mean(), torch.zeros(9))
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval(lambda rows: rows.double().mean(), torch.arange(9), level=95)
    assert interval(lambda rows: 1.5, torch.arange(9)) == (1.5, 1.5, 1.5)


def test_a_mean_needs_a_group_for_each_value():
    with pytest.raises(ValueError, match="received 9 values and groups of shape"):
        mean_interval(random(9), torch.arange(8))
    with pytest.raises(ValueError, match="nan or infinite"):
        mean_interval(random(9) / 0, torch.arange(9))
