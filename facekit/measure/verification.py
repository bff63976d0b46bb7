"""What a recogniser is worth: insightface's ten-fold verification, and its floor."""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from facekit.data.faces import ImageRows
from facekit.data.pairs import FOLDS
from facekit.measure.statistics import auc, interval_over_seeds, tar_at_far, threshold_at_far
from facekit.nets import embed

CENTRED = ' centred'      # ends the name of a set that was centred on its mean


@dataclass
class PairScores:
    """How a recogniser sees the pairs of a set."""
    distance: np.ndarray      # float64 (P,), squared L2 of unit embeddings, 0..4
    same: np.ndarray          # bool (P,): of one person

    def wrong(self):
        """Which pairs the ten-fold protocol decides wrongly, float64 (P,), 0 or 1."""
        return 1.0 - fold_decisions(self.distance, self.same)[0]


def fold_decisions(distance, same):
    """Which pairs insightface's ten-fold protocol gets right, bool (P,), and their folds (P,).

    distance (P,): squared L2 distances of unit embeddings, 0..4; same (P,) bool. Thresholds 0..4
    by 0.01, 'same' when distance < threshold, first best threshold of the other nine contiguous
    folds. All thresholds and folds come from one histogram.
    """
    thresholds = np.arange(0, 4, 0.01)
    first = np.searchsorted(thresholds, distance, side='right')     # threshold that accepts it
    sizes = np.full(FOLDS, len(same) // FOLDS)
    sizes[:len(same) % FOLDS] += 1
    fold = np.repeat(np.arange(FOLDS), sizes)
    # +1 for a same pair that becomes right, -1 for a different pair that becomes wrong
    change = np.zeros((FOLDS, len(thresholds) + 1), np.int64)
    np.add.at(change, (fold, first), np.where(same, 1, -1))
    different = np.bincount(fold[~same], minlength=FOLDS)
    right = change[:, :-1].cumsum(1) + different[:, None]            # (fold, threshold)
    best = (right.sum(0) - right).argmax(1)
    return (distance < thresholds[best[fold]]) == same, fold


def fold_accuracies(distance, same):
    """Ten-fold accuracies of insightface's protocol, float64 (10,)."""
    right, fold = fold_decisions(distance, same)
    return np.bincount(fold, right) / np.bincount(fold)


def paired_difference(ours, theirs, same, draws=1000):
    """By how much one recogniser is better than another on the same pairs, over seeds.

    ours, theirs: {seed: distances (P,)}, of which the common seeds count (none: {} is returned).
    {figure: [mean, low, high]} of accuracy and TAR at FAR 1 %, with the intervals of
    interval_over_seeds(); thresholds stay as they are.
    """
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not both:
        return {}
    rng, result = np.random.default_rng(0), {}

    def accepted(distance):
        return (distance < threshold_at_far(distance, same, 1e-2))[same]

    def decided(distance):
        return fold_decisions(distance, same)[0]

    for name, good in (('accuracy', decided), ('tar@far=1e-2', accepted)):
        gain = np.stack([good(a).astype(float) - good(b) for a, b in both])
        result[name] = interval_over_seeds(gain, rng, draws)
    return result


def pair_distances(z, pairs):
    """Squared distances 0..4, float64 (P,), of the pairs (P, 2) of unit embeddings z (M, d)."""
    z = z.double()
    return (z[pairs[:, 0]] - z[pairs[:, 1]]).square().sum(1).cpu().numpy()


def figures_of(scores, sha256):
    """The figures of results.json for PairScores."""
    distance, same = scores.distance, scores.same
    accuracy = fold_accuracies(distance, same)
    figures = {'accuracy': accuracy.mean(), 'std': accuracy.std(), 'auc': auc(distance, same),
               'tar@far=1e-2': tar_at_far(distance, same, 1e-2),
               'tar@far=1e-3': tar_at_far(distance, same, 1e-3), 'pairs': len(same),
               'sha256': sha256}
    if (~same).sum() >= 10_000:               # of fewer, not one may be accepted
        figures['tar@far=1e-4'] = tar_at_far(distance, same, 1e-4)
    return figures


def verify(net, sets, cfg, device):
    """Verification of a recogniser on PairSets: {name: figures} and {name: PairScores}; with
    evaluate.centred also without the set's mean embedding, which a recogniser of few people sees
    in all pictures that are not its own."""
    results, scores = {}, {}
    for s in sets:
        every = ImageRows(s.images, np.arange(len(s.images)))
        embeddings = {s.name: embed.unit_embeddings(net, every, cfg, device).double()}
        if cfg.evaluate.centred:
            z = embeddings[s.name]
            embeddings[s.name + CENTRED] = F.normalize(z - z.mean(0))
        for name, z in embeddings.items():
            scores[name] = PairScores(pair_distances(z, s.pairs), s.same)
            results[name] = figures_of(scores[name], s.sha256)
    return results, scores


def component_floor(faces, sets, centred, components=100):
    """Verification by whitened principal components of pixels of faces (N, H, W, 3), which know
    nothing of identity: {name: figures}; `centred` as in verify()."""
    def small(photos):
        x = torch.as_tensor(np.array(photos)).permute(0, 3, 1, 2).float()
        return F.adaptive_avg_pool2d(x + x.flip(3), 24).flatten(1).double()

    x = small(faces)
    mean = x.mean(0)
    x = x - mean
    values, vectors = torch.linalg.eigh(x.T @ x)
    whiten = vectors[:, -components:] / values[-components:].clamp(min=1e-9).sqrt()
    results = {}
    for s in sets:
        tested = small(s.images)
        centres = {s.name: mean}
        if centred:
            centres[s.name + CENTRED] = tested.mean(0)
        for name, centre in centres.items():
            distance = pair_distances(F.normalize((tested - centre) @ whiten), s.pairs)
            results[name] = figures_of(PairScores(distance, s.same), s.sha256)
    return results
