"""Confidence intervals agree with scipy's and cover what they promise."""

import numpy as np
import pytest
import scipy.stats
import torch

from imprompt.evaluation.metrics import clip_mmd, frechet_distance
from imprompt.utils import statistics
from imprompt.utils.statistics import bootstrap_interval, jackknife_interval, mean_interval

close = pytest.approx


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_interval_of_many_values_is_the_normal_one():
    values = random(2500) ** 2
    interval = mean_interval(values, torch.arange(2500), resamples=6000)
    margin = 1.959964 * values.std().item() / 2500**0.5
    assert interval.value == close(values.mean().item(), rel=1e-6)
    assert (interval.low, interval.high) == close((interval.value - margin, interval.value + margin), abs=0.05 * margin)
    assert mean_interval(values, torch.arange(2500)) == mean_interval(values, torch.arange(2500))
    narrow = mean_interval(values, torch.arange(2500), resamples=6000, confidence_level=0.5)
    assert narrow.high - narrow.low == close(2 * margin * 0.67449 / 1.959964, rel=0.1)


def test_mean_interval_against_scipy_bootstrap():
    values = random(60).double() ** 2
    interval = mean_interval(values, torch.arange(60), resamples=20_000)
    expected = scipy.stats.bootstrap((values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    width = expected.high - expected.low
    assert (interval.low, interval.high) == close((expected.low, expected.high), abs=0.03 * width)


def test_correlated_samples_of_one_prompt_widen_the_interval():
    """With correlation ρ within prompts of k samples, the variance of the mean is 1 + (k − 1) ρ times that of independent ones."""
    prompts, k, rho = 400, 4, 0.6
    values = (rho**0.5 * random(prompts, 1) + (1 - rho) ** 0.5 * random(prompts, k, seed=1)).flatten()
    groups = torch.arange(prompts).repeat_interleave(k)
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    clustered, independent = mean_interval(values, groups), mean_interval(values, torch.arange(len(values)))
    assert clustered.value == independent.value
    assert clustered.half_width / independent.half_width == close((1 + (k - 1) * rho) ** 0.5, rel=0.12)
    relabeled = mean_interval(values[shuffled], 7 * groups[shuffled] - 3)  # group labels may be any numbers in any order
    assert relabeled == close(clustered, rel=1e-9)


def test_bootstrap_of_a_mean_is_the_mean_interval(monkeypatch):
    values, groups = random(90), torch.arange(90) % 31  # groups of unequal size
    general = bootstrap_interval(lambda rows: values[rows].mean(), groups, resamples=4000)
    vectorized = mean_interval(values, groups, resamples=4000)
    assert general.value == close(vectorized.value)
    assert (general.low, general.high) == close((vectorized.low, vectorized.high), abs=0.05 * (vectorized.high - vectorized.low))
    monkeypatch.setattr(statistics, "_MAX_RESAMPLED_GROUPS", 31 * 64)  # computed in parts
    parts = mean_interval(values, groups, resamples=4000)
    assert (parts.low, parts.high) == close((vectorized.low, vectorized.high), abs=0.05 * (vectorized.high - vectorized.low))
    median = bootstrap_interval(lambda rows: values[rows].median(), groups)
    assert median.low < median.value < median.high


def test_jackknife_of_a_mean_is_the_t_interval():
    values = random(200)
    interval = jackknife_interval(lambda rows: values[rows].mean(), torch.arange(200), folds=200)
    expected = scipy.stats.t.interval(0.95, 199, values.mean(), scipy.stats.sem(values))
    assert interval == close((values.mean().item(), *expected), rel=1e-4)
    five_groups = jackknife_interval(lambda rows: values[rows].mean(), torch.arange(5))  # fewer groups than folds
    assert five_groups[1:] == close(scipy.stats.t.interval(0.95, 4, values[:5].mean(), scipy.stats.sem(values[:5])), rel=1e-4)


def clustered_features(seed, prompts=40, k=4, width=16):
    """Features of generated images, correlated within each prompt; marginally Gaussian with mean 0.4 and variance 1."""
    individual, common = random(prompts, k, width, seed=2 * seed), random(prompts, 1, width, seed=2 * seed + 1)
    return (0.4 + 0.6**0.5 * common + 0.4**0.5 * individual).flatten(0, 1)


@pytest.mark.parametrize(("metric", "max_bootstrap_coverage"), [(frechet_distance, 0.7), (clip_mmd, 1.0)], ids=["fid", "cmmd"])
def test_jackknife_covers_what_the_bootstrap_misses(metric, max_bootstrap_coverage):
    """The true value is the mean over many sets of prompts of the same size."""
    real, groups = random(160, 16, seed=999_999), torch.arange(40).repeat_interleave(4)
    truth = np.mean([metric(real, clustered_features(i)) for i in range(1000, 1400)])

    def covers_truth(compute_interval, features, **options):
        interval = compute_interval(lambda rows: metric(real, features[rows]), groups, **options)
        return interval.low <= truth <= interval.high

    jackknife = [covers_truth(jackknife_interval, clustered_features(i)) for i in range(100)]
    bootstrap = [covers_truth(bootstrap_interval, clustered_features(i), resamples=60) for i in range(20)]
    assert 0.88 <= np.mean(jackknife) <= 0.99
    assert np.mean(bootstrap) <= max_bootstrap_coverage


@pytest.mark.parametrize("compute_interval", [bootstrap_interval, jackknife_interval])
def test_an_interval_needs_two_prompts(compute_interval):
    with pytest.raises(ValueError, match=r"at least 2 groups \(prompts\), received 1"):
        compute_interval(lambda rows: rows.double().mean(), torch.zeros(9))
    with pytest.raises(ValueError, match="between 0 and 1"):
        compute_interval(lambda rows: rows.double().mean(), torch.arange(9), confidence_level=95)
    assert compute_interval(lambda rows: 1.5, torch.arange(9)) == (1.5, 1.5, 1.5)


def test_a_mean_needs_a_group_for_each_value():
    with pytest.raises(ValueError, match="received 9 values and groups of shape"):
        mean_interval(random(9), torch.arange(8))
    with pytest.raises(ValueError, match="nan or infinite"):
        mean_interval(random(9) / 0, torch.arange(9))
