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
