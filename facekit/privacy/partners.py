"""Which image of somebody's release was made from which original: told by what both are called."""
import re
from pathlib import Path

import numpy as np

from facekit.base.errors import InputError
from facekit.data.names import look_of
from facekit.nets.embed import pixel_embeddings

ALIKE = 4.0       # standard errors by which partners have to be more alike than others


def key_of_name(name):
    """What a name is matched by: its look, with numbers as such, so that p01 is p1."""
    return re.sub(r'\d+', lambda number: f'{int(number[0]):020}', look_of(name))


def keys_of(faceset):
    """What the images (N,) of a FaceSet are matched by: the key of each one's person, and that of
    its file, or None where images have no names."""
    person = [key_of_name(name) for name in faceset.people]
    sources = faceset.source.files
    if len(sources) < len(faceset):                  # records: one file holds all
        return [person[label] for label in faceset.labels], None
    return ([person[label] for label in faceset.labels],
            [key_of_name(Path(sources[row]).stem) for row in faceset.images.numbers])


def partners(release, originals):
    """The released row of each original, int64 (N,), of two FaceSets.

    People are matched by their names or label numbers, and images of a person by their files'
    names; images without names by their order. InputError where the sets do not fit together.
    """
    (people_a, files_a), (people_b, files_b) = keys_of(release), keys_of(originals)
    named = files_a is not None and files_b is not None
    keys_a, keys_b = (list(zip(people, files)) if named else numbered(people)
                      for people, files in ((people_a, files_a), (people_b, files_b)))
    place = {key: row for row, key in enumerate(keys_a)}
    if len(place) < len(keys_a) or len(keys_a) != len(keys_b) or place.keys() != set(keys_b):
        raise InputError(
            f'{release.path} ({len(keys_a)} good images of {len(release.people)} people) and '
            f'{originals.path} ({len(keys_b)} of {len(originals.people)}) do not have the same '
            'people and images: give the folders and files of both the same names, and records '
            'the same label numbers')
    return np.array([place[key] for key in keys_b])


def numbered(people):
    """(person, number of the image among that person's) of each image's person, a list (N,)."""
    count = {}
    keys = []
    for person in people:
        keys.append((person, count.get(person, 0)))
        count[person] = count.get(person, 0) + 1
    return keys


def check_alike(released, originals, device):
    """Refuse partners, ImageRows and a FaceSet in one order, that are no more alike than images
    that were drawn by lot: in a wrong order a release looks private."""
    some = np.random.default_rng(0).permutation(len(originals))[:2000]
    a = pixel_embeddings(released.take(some), device)
    b = pixel_embeddings(originals.select(some), device)
    gain = (a * b).sum(1) - (a * b.roll(1, 0)).sum(1)
    error = gain.std() / len(some) ** 0.5
    if gain.mean() < ALIKE * error:
        raise InputError(
            f'the images of the release are no more alike to their originals in {originals.path} '
            'than to others: they seem to be in another order, or were not made from them; give '
            'both the same names')
