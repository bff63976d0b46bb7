"""Which image of somebody's release was made from which original: told by what both are called."""
import re
from pathlib import Path

import numpy as np

from facekit.base.errors import InputError
from facekit.data.names import look_of
from facekit.nets.embed import pixel_embeddings

# Shares of images, give or take a standard error, that may be no more alike to their own original
# than to one of another person, and of the same person. On LFW they are 0.01 and 0.02 with 75 %
# hidden, 0 with noise of 128; 0.2 to 0.3 where half of the partners are wrong, and 0.6 where each
# is the person's next image
UNLIKE, UNLIKE_OWN = 0.15, 0.4


def key_of_name(name):
    """What a name is matched by: its look, with numbers as such, so that p01 is p1."""
    return re.sub(r'\d+', lambda number: number[0].lstrip('0').zfill(20), look_of(name))


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
    keys_a, keys_b = (list(zip(people, files)) if named else numbered(people, files)
                      for people, files in ((people_a, files_a), (people_b, files_b)))
    place = {key: row for row, key in enumerate(keys_a)}
    if len(place) < len(keys_a) or len(keys_a) != len(keys_b) or place.keys() != set(keys_b):
        raise InputError(
            f'{release.path} ({len(keys_a)} good images of {len(release.people)} people) and '
            f'{originals.path} ({len(keys_b)} of {len(originals.people)}) do not have the same '
            'people and images: give the folders and files of both the same names, and records '
            'the same label numbers')
    return np.array([place[key] for key in keys_b])


def numbered(people, names):
    """(person, number of the image among that person's) of each image's person, a list (N,); they
    are counted by their files' `names`, or as they come if they have none."""
    order = range(len(people))
    if names is not None:
        order = sorted(order, key=lambda i: names[i])
    count, keys = {}, [None] * len(people)
    for i in order:
        keys[i] = people[i], count.get(people[i], 0)
        count[people[i]] = count.get(people[i], 0) + 1
    return keys


def check_alike(released, originals, device):
    """Refuse partners, ImageRows and a FaceSet in one order, of which too many are no more alike
    than other images: in a wrong order a release looks private."""
    some = np.random.default_rng(0).permutation(len(originals))[:2000]
    another = next_of_person(originals.labels)[some]
    alike = {name: (pixel_embeddings(released.take(some), device)
                    * pixel_embeddings(originals.select(rows), device)).sum(1).cpu().numpy()
             for name, rows in (('own', some), ('others', np.roll(some, 1)), ('person', another))}
    for unlike, limit, whom in (
            (alike['own'] <= alike['others'], UNLIKE, 'another person'),
            ((alike['own'] <= alike['person'])[another != some], UNLIKE_OWN, 'the same person')):
        if len(unlike) and unlike.mean() > limit + (limit * (1 - limit) / len(unlike)) ** 0.5:
            raise InputError(
                f'{100 * unlike.mean():.0f} % of the released images are no more alike to their '
                f'original in {originals.path} than to one of {whom}: they seem to be in another '
                'order, or were not made from them; give both the same names, or use '
                'evaluate.partners=false for a set without partners')


def next_of_person(labels):
    """The row of each person's next image, after the last one the first, int64 (N,)."""
    order = np.argsort(labels, kind='stable')
    rising = labels[order]
    first, end = (np.searchsorted(rising, rising, side) for side in ('left', 'right'))
    following = np.arange(1, len(labels) + 1)
    result = np.empty_like(order)
    result[order] = order[np.where(following < end, following, first)]
    return result
