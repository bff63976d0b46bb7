"""Rates, areas and intervals."""
import numpy as np


def threshold_at_far(distance, same, far):
    """The loosest threshold that accepts at most floor(far * count) of the different pairs: those
    whose distance is below; no interpolation."""
    others = np.sort(distance[~same])
    return others[min(int(far * len(others)), len(others) - 1)]


def tar_at_far(distance, same, far):
    """Share of same pairs that are accepted at threshold_at_far."""
    return float((distance[same] < threshold_at_far(distance, same, far)).mean())


def auc(distance, same):
    """Area under the ROC: chance that a same pair is closer than a different one (ties half)."""
    others, own = np.sort(distance[~same]), distance[same]
    left, right = (np.searchsorted(others, own, side) for side in ('left', 'right'))
    return float((len(others) - (left + right) / 2).mean() / len(others))


def interval(hits, person, draws=1000):
    """95 % bootstrap interval of the mean of hits (n,), drawing people (n,) with all theirs."""
    index = np.unique(person, return_inverse=True)[1]
    total, count = np.bincount(index, hits), np.bincount(index)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), draws)
    return np.percentile(weights @ total / (weights @ count), [2.5, 97.5]).tolist()


def interval_over_seeds(values, rng, draws=1000):
    """[mean, low, high] of values (seeds, n) of the same n pairs, with a 95 % interval: pairs are
    drawn (bootstrap), and seeds taken as normal, of which few tell the spread badly (Student's
    t)."""
    seeds, n = values.shape
    means = np.array([values.mean(0) @ rng.multinomial(n, np.full(n, 1 / n))
                      for _ in range(draws)]) / n
    if seeds > 1:
        means += rng.standard_t(seeds - 1, draws) * values.mean(1).std(ddof=1) / seeds ** 0.5
    return [values.mean(), *np.percentile(means, [2.5, 97.5])]


def t_half_width(values):
    """Half of the 95 % interval of the mean of normal values (n,); 0 for a single one."""
    if len(values) < 2:
        return 0.0
    t = np.percentile(np.random.default_rng(0).standard_t(len(values) - 1, 100_000), 97.5)
    return t * np.std(values, ddof=1) / len(values) ** 0.5
