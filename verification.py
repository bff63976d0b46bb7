"""What a recogniser is worth: insightface's ten-fold verification, ROC figures, and floors."""
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import batches
import data
import embed
import models
import records
from records import InputError

FOLDS = 10
CENTRED = ' centred'      # ends the name of a set that was centred on its mean


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


def threshold_at_far(distance, same, far):
    """The loosest threshold that accepts at most floor(far * count) of the different pairs.

    A pair is accepted when its distance is below; no interpolation.
    """
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


def paired_difference(ours, theirs, same, draws=1000):
    """By how much one recogniser is better than another on the same pairs, over seeds.

    ours, theirs: {seed: distances (P,)}, of which the common seeds count (none: {} is returned).
    {figure: [mean, low, high]} of accuracy and TAR at FAR 1 %, with 95 % bootstrap intervals that
    draw pairs and seeds; thresholds stay as they are.
    """
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not both:
        return {}
    rng, result = np.random.default_rng(0), {}
    seeds = rng.multinomial(len(both), np.full(len(both), 1 / len(both)), draws) / len(both)

    def accepted(distance):
        return (distance < threshold_at_far(distance, same, 1e-2))[same]

    for name, good in (('accuracy', lambda d: fold_decisions(d, same)[0]),
                       ('tar@far=1e-2', accepted)):
        gain = np.stack([good(a).astype(float) - good(b) for a, b in both])
        means = [s @ gain @ rng.multinomial(gain.shape[1], np.full(gain.shape[1],
                 1 / gain.shape[1])) / gain.shape[1] for s in seeds]
        result[name] = [gain.mean(), *np.percentile(means, [2.5, 97.5])]
    return result


def find_set(name, cfg):
    """Path of a verification set: as it stands, or beside the training data."""
    root = Path(cfg.data.root)
    places = [Path(name), (root.parent if root.suffix == '.rec' else root) / name]
    return next((p for p in places if p.is_file()), places[0])


def load_pairs(path, cfg):
    """A verification set: distinct images uint8 (M, S, S, 3), pairs int64 (P, 2), same (P,)."""
    encoded, same = records.read_bin(path)
    if len(same) < FOLDS or same.all() or not same.any():
        raise InputError(f'{path} has {same.sum()} same pairs of {len(same)}: a verification set '
                         f'needs both kinds, and {FOLDS} pairs or more')
    number = {}
    place = np.array([number.setdefault(bytes(e), len(number)) for e in encoded])
    images = []
    for i, file in enumerate(number):
        where = f'{path} image {i} (from 0)'
        images.append(data.pixels(records.decode(file, where), where, cfg.data.size, 'resize'))
    return np.stack(images), place.reshape(-1, 2), same


def held_back(fold, count=3000):
    """A verification set, like load_pairs, of the public people who are in no training."""
    rng, labels = np.random.default_rng(0), fold.data.labels[fold.validation]
    order = labels.argsort(kind='stable')
    _, first, size = np.unique(labels[order], return_index=True, return_counts=True)
    if len(size) < 2 or size.max() < 2:
        raise InputError(f'the {len(labels)} images of public people who are held back are of '
                         f'{len(size)}: raise data.validation')
    first, size = (np.repeat(x, size) for x in (first, size))
    a = rng.choice(np.flatnonzero(size > 1), count)         # places in `order`
    b = first[a] + (a - first[a] + rng.integers(1, size[a])) % size[a]
    c = (first[a] + size[a] + rng.integers(0, len(order) - size[a])) % len(order)
    pairs = order[np.stack([np.stack([a, b], 1), np.stack([a, c], 1)], 1)].reshape(-1, 2)
    return np.asarray(fold.data.images[fold.validation]), pairs, np.arange(2 * count) % 2 == 0


def unit_embeddings(net, images, chosen, cfg, device):
    """f(x) + f(mirrored x) of uint8 images[chosen], L2-normalised, float32 (N, d)."""
    store = batches.Store(images, chosen, device)
    plain, mirrored = embed.embed_all(net, store, cfg.evaluate.batch, cfg.run.precision)
    return F.normalize(plain + mirrored)


def pair_distances(z, pairs):
    """Squared distances 0..4, float64 (P,), of the pairs (P, 2) of unit embeddings z (M, d)."""
    z = z.double()
    return (z[pairs[:, 0]] - z[pairs[:, 1]]).square().sum(1).cpu().numpy()


def figures_of(distance, same, path):
    """The figures of results.json for one set of pairs."""
    accuracy = fold_accuracies(distance, same)
    return {'accuracy': accuracy.mean(), 'std': accuracy.std(), 'auc': auc(distance, same),
            'tar@far=1e-2': tar_at_far(distance, same, 1e-2),
            'tar@far=1e-3': tar_at_far(distance, same, 1e-3), 'pairs': len(same),
            'sha256': hashlib.sha256(Path(path).read_bytes()).hexdigest()
            if Path(path).is_file() else None}


def verify(net, sets, cfg, device):
    """Verification of a recogniser on each set: results by name, and the distances of each.

    With evaluate.centred also without the set's mean embedding. That needs the set but no labels;
    a recogniser of few people sees other pictures than its own in one common direction.
    """
    results, curves = {}, {}
    for path, (images, pairs, same) in sets.items():
        z = unit_embeddings(net, images, range(len(images)), cfg, device).double()
        seen = {'': z}
        if cfg.evaluate.centred:
            seen[CENTRED] = F.normalize(z - z.mean(0))
        for ending, z in seen.items():
            name, distance = Path(path).stem + ending, pair_distances(z, pairs)
            results[name] = figures_of(distance, same, path)
            curves[name] = distance, same
    return results, curves


def component_floor(faces, sets, components=100):
    """Verification by whitened principal components of pixels, which know nothing of identity.

    faces (N, H, W, 3) uint8. Each test set is always centred on its own mean, which alone gains
    points: one floor for verify()'s plain and centred figures.
    """
    def flat(images):
        x = torch.as_tensor(np.array(images)).permute(0, 3, 1, 2).float()
        x = F.adaptive_avg_pool2d(x + x.flip(3), 24).flatten(1).double()
        return x - x.mean(0)

    x = flat(faces)
    values, vectors = torch.linalg.eigh(x.T @ x)
    whiten = vectors[:, -components:] / values[-components:].clamp(min=1e-9).sqrt()
    results = {}
    for path, (images, pairs, same) in sets.items():
        distance = pair_distances(F.normalize(flat(images) @ whiten), pairs)
        for ending in ('', CENTRED):
            results[Path(path).stem + ending] = figures_of(distance, same, path)
    return [{'verification': results}]


def floors(cfg, sets, device):
    """What recognisers reach that learnt nothing: an untrained net of each seed.

    Its BatchNorms take the statistics of test images.
    """
    results, some = [], next(iter(sets.values()))[0][:256]
    for seed in cfg.compare_seeds or [cfg.run.seed]:
        torch.manual_seed(seed)
        net = models.iresnet(cfg.fr.depth, cfg.fr.width, cfg.data.size, cfg.fr.dim).to(device)
        embed.calibrate(net, torch.from_numpy(some).to(device))
        results.append({'verification': verify(net.eval(), sets, cfg, device)[0]})
    return results
