"""Verification pairs: insightface's .bin, LFW's pairs.txt, a list, or people held back."""
import glob
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facekit.base import files, process
from facekit.base.errors import InputError, counted, quoted
from facekit.data import images
from facekit.data.bins import read_bin
from facekit.data.faces import warn_if_unaligned
from facekit.data.sources import FolderSource, is_drawn, read_lines, separated

FOLDS = 10      # of insightface's protocol: a set needs as many pairs
# How lists say that a pair is of one person
SAME = {'1': True, 'true': True, '0': False, '-1': False, 'false': False}


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
    beside = (root.parent if root.suffix in ('.rec', '.txt') else root) / name
    return beside if not Path(name).exists() and beside.exists() else Path(name)


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
    a list, .txt, of lines `first.jpg second.jpg 1` or `first.jpg, second.jpg, True`, in UTF-8, of
    files relative to where it lies; see SAME.
    """
    if not path.exists():
        raise InputError(f'verification set {path} is neither there nor in data.root: name it in '
                         f'evaluate.sets by a path relative to {Path.cwd()}, or whole')
    if not path.is_dir() and path.suffix != '.txt':
        return read_bin(path)
    lines = path / 'pairs.txt' if path.is_dir() else path
    files_of_pairs, same, verdicts = [], [], {}
    for number, line in read_lines(lines):
        words = line.split('\t') if path.is_dir() else separated(line)
        try:
            if path.is_dir():
                if number == 1 and len(words) <= 2:     # how many folds and pairs there are
                    continue
                one_person = len(words) == 3
                people = words[0], words[0] if one_person else words[2]
                pair = [next(path.glob(f'{glob.escape(name)}/{glob.escape(name)}_{int(i):04}.*'))
                        for name, i in zip(people, (words[1], words[-1]))]
                same.append(one_person)
            else:
                first, second, is_same = words
                pair = [path.parent / first, path.parent / second]
                same.append(SAME[is_same.lower()])
        # OSError: a name too long; NotImplementedError: one that begins with /
        except (ValueError, IndexError, KeyError, StopIteration, OSError, NotImplementedError):
            raise InputError(f'{lines}: line {number} is no pair of images that are there: see '
                             'docs/usage.md for the form') from None
        if missing := [file for file in pair if not os.path.isfile(file)]:
            raise InputError(f'{lines}: line {number} names {quoted(str(missing[0]))}, which is '
                             'not there: copy it there, or remove the line')
        if verdicts.setdefault(frozenset(map(os.path.normpath, pair)), same[-1]) != same[-1]:
            raise InputError(f'{lines}: line {number} has the pair of an earlier line, and says '
                             'the contrary: remove the wrong one')
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
        image = images.decode(file, where, FolderSource.formats)
        cut += image.shape[1] != image.shape[2]
        pixels.append(images.fitted(image, where, size, 'resize'))
    if cut:
        process.say(f'warning: {counted(cut, "image")} of {path} not square: the middle is taken')
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
