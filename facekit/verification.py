"""What a recogniser is worth: insightface's ten-fold verification, and its floor."""
import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from facekit import embed, files, images, run
from facekit.bins import read_bin
from facekit.errors import InputError, counted
from facekit.faces import ImageRows, warn_if_unaligned
from facekit.toy import is_drawn

FOLDS = 10
CENTRED = ' centred'      # ends the name of a set that was centred on its mean


# -------------------------------------------------------------------------------------- statistics

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


# ------------------------------------------------------------------------------------------- pairs

@dataclass
class PairSet:
    """Pairs of images, of one person or of two, that a recogniser is tested on."""
    name: str                 # in results and tables
    images: np.ndarray        # uint8 (M, S, S, 3), distinct
    pairs: np.ndarray         # int64 (P, 2): which images
    same: np.ndarray          # bool (P,): of one person
    sha256: str | None        # of the file, as there are several of one name; None = made here


def find_set(name, cfg):
    """Path of a verification set: as it stands, or beside the training data."""
    root = Path(cfg.data.root)
    places = [Path(name), (root.parent if root.suffix == '.rec' else root) / name]
    return next((p for p in places if p.is_file() or (p / 'pairs.txt').is_file()), places[0])


def load_pair_sets(cfg, size):
    """The PairSets of evaluate.sets, their images resized to `size` pixels."""
    paths = list(dict.fromkeys(find_set(name, cfg) for name in cfg.evaluate.sets))
    if len({path.stem for path in paths}) < len(paths):
        raise InputError(f'evaluate.sets = {cfg.evaluate.sets} has two sets of one name, which '
                         'is all that tells them apart: rename a file')
    return [load_pairs(path, size) for path in paths]


def read_pairs(path):
    """The pairs of a verification set: 2P image files (bytes-like) and bool (P,).

    path: insightface's .bin; a folder with LFW's pairs.txt and its images, NAME/NAME_0001.jpg; or
    a list, .txt, of lines `first.jpg second.jpg 1` (1 = one person), relative to where it lies.
    """
    if not path.exists():
        raise InputError(f'verification set {path} is neither there nor in data.root: name it in '
                         f'evaluate.sets by a path relative to {Path.cwd()}, or whole')
    if not path.is_dir() and path.suffix != '.txt':
        return read_bin(path)
    lines = path / 'pairs.txt' if path.is_dir() else path
    files_of_pairs, same = [], []
    for number, line in enumerate(bytes(files.open_bytes(lines)).decode('latin1').splitlines(), 1):
        words = line.split('\t') if path.is_dir() else line.split()
        try:
            if path.is_dir():
                if len(words) <= 2:                     # the first line: folds and pairs
                    continue
                first, second = (words[0], words[1]), (words[-2], words[-1])
                if len(words) == 3:
                    second = words[0], words[2]
                pair = [next(path.glob(f'{glob.escape(name)}/{glob.escape(name)}_{int(i):04}.*'))
                        for name, i in (first, second)]
                same.append(len(words) == 3)
            else:
                pair = [path.parent / word for word in words[:2]]
                same.append(bool({'1': 1, '0': 0}[words[2]]))
        except (ValueError, IndexError, KeyError, StopIteration):
            raise InputError(f'{lines}: line {number} is no pair of images that are there: see '
                             'docs/usage.md for the form') from None
        files_of_pairs += pair
    return [files.open_bytes(file) for file in files_of_pairs], np.array(same, bool)


def load_pairs(path, size):
    """The PairSet at `path` (see read_pairs()), its images resized to `size` pixels."""
    encoded, same = read_pairs(path)
    if len(same) < FOLDS or same.all() or not same.any():
        raise InputError(f'{path} has {same.sum()} same pairs of {len(same)}: a verification set '
                         f'needs both kinds, and {FOLDS} pairs or more')
    number = {}                        # of each distinct image, many of which stand in many pairs
    place = np.array([number.setdefault(bytes(file), len(number)) for file in encoded])
    pixels, cut = [], 0
    for i, file in enumerate(number):
        where = f'{path} image {i} (from 0)'
        image = images.decode(file, where)
        cut += image.shape[1] != image.shape[2]
        pixels.append(images.fitted(image, where, size, 'resize'))
    if cut:
        run.say(f'warning: {counted(cut, "image")} of {path} not square: the middle was cut out')
    if not is_drawn(path.parent):
        warn_if_unaligned(np.stack(pixels), path)
    content = path.read_bytes() if path.is_file() else b''.join(number)
    return PairSet(path.stem, np.stack(pixels), place.reshape(-1, 2), same, files.digest(content))


def held_back(fold, count=3000):
    """A PairSet of the public people of a fold who are in no training, 2 * count pairs: each photo
    with another one of its person, and with one of somebody else."""
    check_held_back(fold)
    rng, labels = np.random.default_rng(0), fold.public.labels[fold.validation]
    order = labels.argsort(kind='stable')                    # by person; places are in this order
    begin, end = (np.searchsorted(labels[order], labels[order], side)
                  for side in ('left', 'right'))             # of the person at each place
    place = rng.choice(np.flatnonzero(end - begin > 1), count)
    begin, size = begin[place], (end - begin)[place]
    same = begin + (place - begin + rng.integers(1, size)) % size
    other = (begin + size + rng.integers(0, len(order) - size)) % len(order)
    pairs = order[np.stack([place, same, place, other], 1)].reshape(-1, 2)
    return PairSet('held back', fold.public.select(fold.validation).pixels(), pairs,
                   np.arange(2 * count) % 2 == 0, None)


def check_held_back(fold):
    """Refuse a fold whose validation people make no pairs."""
    counts = np.unique(fold.public.labels[fold.validation], return_counts=True)[1]
    if len(counts) < 2 or counts.max() < 2:
        raise InputError(f'the {counts.sum()} images of public people who are held back are of '
                         f'{len(counts)}: raise data.validation')


# ------------------------------------------------------------------------------------ verification

@dataclass
class PairScores:
    """How a recogniser sees the pairs of a set."""
    distance: np.ndarray      # float64 (P,), squared L2 of unit embeddings, 0..4
    same: np.ndarray          # bool (P,): of one person


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
    {figure: [mean, low, high]} of accuracy and TAR at FAR 1 %, with 95 % intervals: pairs are
    drawn (bootstrap), and seeds taken as normal, of which few tell the spread badly (Student's
    t); thresholds stay as they are.
    """
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if not both:
        return {}
    rng, result, count = np.random.default_rng(0), {}, len(both)

    def accepted(distance):
        return (distance < threshold_at_far(distance, same, 1e-2))[same]

    def decided(distance):
        return fold_decisions(distance, same)[0]

    for name, good in (('accuracy', decided), ('tar@far=1e-2', accepted)):
        gain = np.stack([good(a).astype(float) - good(b) for a, b in both])
        pairs = gain.shape[1]
        means = np.array([gain.mean(0) @ rng.multinomial(pairs, np.full(pairs, 1 / pairs))
                          for _ in range(draws)]) / pairs
        if count > 1:
            means += rng.standard_t(count - 1, draws) * gain.mean(1).std(ddof=1) / count ** 0.5
        result[name] = [gain.mean(), *np.percentile(means, [2.5, 97.5])]
    return result


def pair_distances(z, pairs):
    """Squared distances 0..4, float64 (P,), of the pairs (P, 2) of unit embeddings z (M, d)."""
    z = z.double()
    return (z[pairs[:, 0]] - z[pairs[:, 1]]).square().sum(1).cpu().numpy()


def figures_of(scores, sha256):
    """The figures of results.json for PairScores."""
    distance, same = scores.distance, scores.same
    accuracy = fold_accuracies(distance, same)
    return {'accuracy': accuracy.mean(), 'std': accuracy.std(), 'auc': auc(distance, same),
            'tar@far=1e-2': tar_at_far(distance, same, 1e-2),
            'tar@far=1e-3': tar_at_far(distance, same, 1e-3), 'pairs': len(same),
            'sha256': sha256}


def verify(net, sets, cfg, device):
    """Verification of a recogniser on PairSets: {name: figures} and {name: PairScores}.

    With evaluate.centred also without the set's mean embedding. That needs the set but no labels;
    a recogniser of few people sees other pictures than its own in one common direction.
    """
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
    """Verification by whitened principal components of pixels, which know nothing of identity:
    {name: figures}.

    faces (N, H, W, 3) uint8, on whose mean pixels are centred; if `centred`, also on that of each
    test set, as in verify().
    """
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
