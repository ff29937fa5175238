"""Every metric agrees with an independent implementation."""

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
    clip_mmd,
    cosine_similarity,
    frechet_distance,
    inception_score,
    kernel_distance,
    pairwise_diversity,
    self_similarity_distance,
    self_similarity_matrix,
)

approx = pytest.approx


def random_normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_two_sets(m=200, n=150, width=12):
    """Samples of two Gaussians with different means and covariances and correlated columns."""
    return random_normal(m, width) @ random_normal(width, width, seed=1), 0.3 + random_normal(n, width, seed=2) @ random_normal(
        width, width, seed=3
    )


# Image by image


def test_cosine_similarity_against_numpy():
    a, b = random_normal(20, 7), random_normal(20, 7, seed=1)
    x, y = a.numpy(), b.numpy()
    expected = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert cosine_similarity(a, b).numpy() == approx(expected, rel=1e-5)
    assert torch.allclose(cosine_similarity(a, -2 * a), -torch.ones(20).double())
    assert torch.allclose(cosine_similarity(a.half(), b.half()).float(), torch.from_numpy(expected), atol=2e-3)
    assert cosine_similarity(a[:0], b[:0]).shape == (0,)


def test_diversity_against_scipy():
    features = random_normal(5, 4, 9)
    expected = [scipy.spatial.distance.pdist(prompt, "cosine").mean() for prompt in features.double().numpy()]
    assert pairwise_diversity(features).numpy() == approx(expected)
    assert pairwise_diversity(features[:1, :1].expand(1, 3, 9)).item() == approx(0, abs=1e-12)
    assert pairwise_diversity(torch.eye(3)[None]).item() == approx(1)
    with pytest.raises(ValueError, match="at least 2 samples of a prompt, received 1"):
        pairwise_diversity(features[:, :1])


def test_self_similarity_distance_against_loops():
    a, b = random_normal(3, 6, 5), random_normal(3, 6, 5, seed=1)

    def matrix(patches):
        return np.array([[1 - scipy.spatial.distance.cosine(p, q) for q in patches] for p in patches])

    expected = [((matrix(x) - matrix(y)) ** 2).mean() for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert self_similarity_distance(a, b).numpy() == approx(expected, rel=1e-4)
    assert self_similarity_matrix(a)[1].numpy() == approx(matrix(a[1].numpy()), rel=1e-4)
    rotation = torch.linalg.qr(random_normal(5, 5, seed=2)).Q  # different features, the same layout
    assert self_similarity_distance(a, 3 * a @ rotation).max() == approx(0, abs=1e-10)
    assert self_similarity_distance(a[:0], b[:0]).shape == (0,)


def test_clip_t_against_torchmetrics_clip_score():
    """CLIPScore of torchmetrics is 100 times the mean, and never below 0."""
    from transformers import CLIPProcessor

    from imprompt.mini import world
    from imprompt.models.clip_score import CLIPScorer

    clip_score = pytest.importorskip("torchmetrics.functional.multimodal").clip_score
    subjects = [world.make_subject(i) for i in range(8)]
    images = [world.render(s, world.make_scene(i)) for i, s in enumerate(subjects)]
    captions = [world.format_full_caption(s, world.make_scene(i)) for i, s in enumerate(subjects)]
    scorer = CLIPScorer.load("mini")

    class EmbeddingModel(nn.Module):
        """torchmetrics 1.9 expects the embedding itself, which transformers returned before version 5."""

        config = scorer.model.config

        def get_image_features(self, pixels):
            return scorer.model.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, tokens, mask):
            return scorer.model.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output

    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    processor = CLIPProcessor(scorer.processor, scorer.tokenizer)
    for prompts in (captions, captions[::-1]):
        ours = cosine_similarity(scorer.embed_images(images), scorer.embed_prompts(prompts)).mean().item()
        score = clip_score(tensors, prompts, lambda: (EmbeddingModel(), processor)).item()
        assert score == approx(max(100 * ours, 0), rel=1e-4, abs=1e-4)


# Set against set


class PassThrough(nn.Module):
    """Stands for the network: inputs are features already."""

    num_features = 12

    def forward(self, x):
        return x


def compute_with_torchmetrics(make_metric, *updates):
    """The value of a metric, or the first of several, after these calls of `update`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = make_metric()
        for arguments in updates:
            metric.update(*arguments)
        value = metric.compute()
    return value[0].item() if isinstance(value, tuple) else value.item()


def frechet_distance_by_definition(real, generated):
    """From means, covariances, and the square root of a matrix, by scipy."""
    real, generated = real.double().numpy(), generated.double().numpy()
    a, b = np.cov(real.T), np.cov(generated.T)
    return ((real.mean(0) - generated.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


def test_frechet_distance_against_scipy_and_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated = make_two_sets()
    assert frechet_distance(real, generated) == approx(frechet_distance_by_definition(real, generated), rel=1e-6)
    by_torchmetrics = compute_with_torchmetrics(
        lambda: FrechetInceptionDistance(feature=PassThrough()), (real.double(), True), (generated.double(), False)
    )
    assert frechet_distance(real, generated) == approx(by_torchmetrics, rel=1e-6)
    # in float32 the features themselves lose digits
    assert frechet_distance(real + 1e4, generated + 1e4) == approx(by_torchmetrics, rel=1e-3)
    assert frechet_distance(real.double() + 1e6, generated.double() + 1e6) == approx(by_torchmetrics, rel=1e-4)
    assert 0 <= frechet_distance(real, real) < 1e-4


def test_frechet_distance_of_fewer_images_than_features():
    real, generated = make_two_sets(20, 30, 256)
    assert frechet_distance(real, generated) == approx(frechet_distance_by_definition(real, generated), rel=1e-4)
    assert frechet_distance(real[:2], generated[:2]) == approx(frechet_distance_by_definition(real[:2], generated[:2]), rel=1e-4)


def test_kernel_distance_against_numpy_and_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = make_two_sets(150, 150)
    x, y = real.double().numpy(), generated.double().numpy()
    xx, yy, xy = ((a @ b.T / 12 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    expected = ((xx.sum() - np.trace(xx)) + (yy.sum() - np.trace(yy))) / (150 * 149) - 2 * xy.mean()
    assert kernel_distance(real, generated, subset_size=150) == approx(expected, rel=1e-6)
    assert kernel_distance(real, generated) == approx(expected, rel=1e-6)  # there are fewer than 1000
    assert kernel_distance(real, real) < 0  # paired sets

    with torch.random.fork_rng():
        torch.manual_seed(7)
        make_metric = lambda: KernelInceptionDistance(feature=PassThrough(), subsets=20, subset_size=40)  # noqa: E731
        by_torchmetrics = compute_with_torchmetrics(make_metric, (real.double(), True), (generated.double(), False))
    assert kernel_distance(real, generated, subsets=20, subset_size=40, seed=7) == approx(by_torchmetrics, rel=1e-9)
    assert kernel_distance(real, generated, subsets=20, subset_size=40, seed=8) != by_torchmetrics
    assert kernel_distance(real, generated[:60]) == kernel_distance(real, generated[:60], subset_size=60)


def test_inception_score_against_numpy_and_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = 2 * random_normal(90, 12)
    p = scipy.special.softmax(logits.double().numpy(), axis=1)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(logits, splits=1) == approx(expected, rel=1e-9)
    assert inception_score(torch.from_numpy(p).log(), splits=1) == approx(expected, rel=1e-9)
    by_torchmetrics = compute_with_torchmetrics(lambda: InceptionScore(feature=PassThrough(), splits=1), (logits.double(),))
    assert inception_score(logits, splits=1) == approx(by_torchmetrics, rel=1e-9)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        by_torchmetrics = compute_with_torchmetrics(lambda: InceptionScore(feature=PassThrough(), splits=10), (logits.double(),))
    assert inception_score(logits, seed=3) == approx(by_torchmetrics, rel=1e-9)
    assert inception_score(torch.eye(10) * 1e5, splits=1) == approx(10)  # certain, and every class once
    assert inception_score(torch.ones(10, 10)) == approx(1)
    assert inception_score(logits[:3]) == inception_score(logits[:3], splits=1)  # no split of a single row
    assert inception_score(logits[:7], splits=3) == inception_score(logits[:7], splits=2)


@pytest.mark.parametrize("unbiased", [True, False])
def test_cmmd_against_scipy(unbiased, monkeypatch):
    real, generated = make_two_sets(90, 70)

    def mean_kernel(a, b, *, without_diagonal=False):
        a, b = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (a, b))
        k = np.exp(-scipy.spatial.distance.cdist(a, b, "sqeuclidean") / (2 * 10**2))
        return k[~np.eye(len(a), dtype=bool)].mean() if without_diagonal else k.mean()

    within = mean_kernel(real, real, without_diagonal=unbiased) + mean_kernel(generated, generated, without_diagonal=unbiased)
    expected = 1000 * (within - 2 * mean_kernel(real, generated))
    assert clip_mmd(real, generated, unbiased=unbiased) == approx(expected, rel=1e-8)
    monkeypatch.setattr(metrics, "_KERNEL_BLOCK", 16)
    assert clip_mmd(2 * real, generated, unbiased=unbiased) == approx(expected, rel=1e-8)


def test_cmmd_of_sets_of_one_distribution_is_unbiased():
    values = [clip_mmd(random_normal(30, 8, seed=i), random_normal(40, 8, seed=1000 + i)) for i in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    assert np.mean([clip_mmd(random_normal(30, 8, seed=i), random_normal(40, 8, seed=1000 + i), unbiased=False) for i in range(20)]) > 0.3


def test_cmmd_needs_little_memory():
    """For 8 000 rows and as many, one kernel matrix would take 512 MB. In a process of its own, which has its own peak."""
    code = """
import resource, torch
from imprompt.evaluation.metrics import clip_mmd
torch.set_num_threads(1)
x, y = torch.randn(8_000, 4), torch.randn(8_000, 4)
clip_mmd(x[:50], y[:50])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert abs(clip_mmd(x, y)) < 1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(process.stdout) < 100  # MB


@pytest.mark.parametrize(
    "metric", [lambda a, b: frechet_distance(a, b), lambda a, b: kernel_distance(a, b, 3, 20), lambda a, b: inception_score(a)]
)
def test_the_global_random_state_is_untouched(metric):
    real, generated = make_two_sets()
    before = torch.get_rng_state()
    assert metric(real, generated) == metric(real, generated)
    assert torch.equal(torch.get_rng_state(), before)


def test_unusable_features_are_rejected():
    real, generated = make_two_sets()
    for metric in (frechet_distance, kernel_distance, clip_mmd):
        assert np.isfinite(metric(real[:2], generated[:2]))
        for pair in ((real[:1], generated), (real, generated[:1])):
            with pytest.raises(ValueError, match="at least 2 rows, received 1"):
                metric(*pair)
        with pytest.raises(ValueError, match=r"received 12 \(real\) and 11 \(generated\)"):
            metric(real, generated[:, :11])
        with pytest.raises(ValueError, match="nan or infinite"):
            metric(real, generated / 0)
        with pytest.raises(ValueError, match=r"shape \(m, width\), received \(200,\)"):
            metric(real[:, 0], generated)
    with pytest.raises(ValueError, match="at least 2 rows"):
        inception_score(real[:1])
    with pytest.raises(ValueError, match=r"of one shape \(n, width\), received \(200, 12\) and \(150, 12\)"):
        cosine_similarity(real, generated)
    with pytest.raises(ValueError, match="received 0 of 9"):
        kernel_distance(real, generated, 0, 9)
    with pytest.raises(ValueError, match="at least 1 split"):
        inception_score(real, 0)
