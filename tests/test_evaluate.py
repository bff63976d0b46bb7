"""The figures of the table: verification protocol, retrieval, image quality."""
import argparse
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hostile
from facekit.base.errors import InputError
from facekit.data import bins, images, pairs, toy
from facekit.data.faces import FaceSet
from facekit.data.pairs import PairSet, held_back, load_pairs
from facekit.measure import verification
from facekit.measure.statistics import auc, tar_at_far
from facekit.nets import embed
from facekit.nets.weights import load_checkpoint

GOLDEN = json.loads((Path(__file__).parent / 'fixtures' / 'verification.json').read_text())


def features(seed, pairs, dim, noise, block):
    """The embeddings of the reference, by the rule of its README."""
    r = np.random.default_rng(seed)
    same = np.resize(np.r_[np.ones(block, bool), np.zeros(block, bool)], pairs)
    base, other = r.standard_normal((pairs, dim)), r.standard_normal((pairs, dim))
    a = base + noise * r.standard_normal((pairs, dim))
    b = np.where(same[:, None], base, other) + noise * r.standard_normal((pairs, dim))
    e = np.empty((2 * pairs, dim))
    e[0::2], e[1::2] = a, b
    plain, flipped = ((e + 0.3 * r.standard_normal(e.shape)) * r.uniform(0.5, 2, (2 * pairs, 1))
                      for _ in range(2))
    z = (plain + flipped).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True), same


@pytest.mark.parametrize('name', GOLDEN)
def test_fold_accuracies_are_insightfaces(name):
    z, same = features(**GOLDEN[name]['args'])
    distance = np.square(z[0::2] - z[1::2]).sum(1)
    accuracy = verification.fold_accuracies(distance, same)
    assert accuracy.tolist() == GOLDEN[name]['accuracy']
    assert accuracy.mean() == pytest.approx(GOLDEN[name]['mean'], abs=1e-15)
    assert accuracy.std() == pytest.approx(GOLDEN[name]['std'], abs=1e-15)


def test_a_distance_on_a_threshold_counts_as_different():
    # 'same' means distance < threshold: insightface's comparison is strict
    distance = np.tile([0.5, 0.51], 50)
    assert verification.fold_accuracies(distance, np.tile([True, False], 50)).mean() == 1
    same = np.tile([True, False], 50)
    assert verification.fold_accuracies(np.full(100, 0.5), same).mean() == 0.5


def test_tar_and_auc_follow_their_definitions():
    rng = np.random.default_rng(0)
    same = rng.random(3000) < 0.5
    distance = np.where(same, rng.normal(1, 0.4, 3000), rng.normal(1.8, 0.4, 3000)).round(2)
    for far in (0.1, 0.01, 0.001):
        tar = tar_at_far(distance, same, far)
        allowed = [t for t in np.unique(distance) if (distance[~same] < t).mean() <= far]
        assert tar == pytest.approx(max((distance[same] < t).mean() for t in allowed))
    pairs = distance[same][:, None] - distance[~same]
    assert auc(distance, same) == pytest.approx(
        ((pairs < 0) + 0.5 * (pairs == 0)).mean())


def test_a_paired_difference_is_of_the_same_pairs_and_over_seeds():
    same, rng = np.arange(400) % 2 == 0, np.random.default_rng(0)
    easy, hard = (np.where(same, 1, 2) + noise * rng.normal(size=400) for noise in (0.01, 1.0))
    assert verification.paired_difference({0: hard}, {0: hard}, same)['accuracy'] == [0, 0, 0]
    mean, low, high = verification.paired_difference({0: easy, 1: hard}, {0: hard},
                                                     same)['accuracy']
    assert mean == pytest.approx(verification.fold_accuracies(easy, same).mean() -
                                 verification.fold_accuracies(hard, same).mean())
    assert 0 < low < mean < high
    # One seed in which it is ahead and one in which it is behind prove nothing
    mean, low, high = verification.paired_difference({0: easy, 1: hard}, {1: easy, 0: hard},
                                                     same)['tar@far=1e-2']
    assert mean == 0 and low < -0.5 and high > 0.5
    assert not verification.paired_difference({0: easy}, {1: hard}, same)


@pytest.mark.long
def test_the_interval_of_a_paired_difference_covers_where_seeds_differ():
    """Of nets that are equally good over seeds, 95 of 100 intervals of three seeds hold 0."""
    same, rng, covered = np.arange(1000) % 2 == 0, np.random.default_rng(0), []

    def seeds():
        return {seed: np.where(same, 1, 2) + rng.uniform(0.4, 0.8) * rng.normal(size=1000)
                for seed in range(3)}

    for _ in range(100):
        _, low, high = verification.paired_difference(seeds(), seeds(), same, 200)['accuracy']
        covered.append(low <= 0 <= high)
    assert np.mean(covered) > 0.9                    # of drawn seeds alone: 0.8


@pytest.mark.parametrize('labels', [
    np.r_[np.repeat(np.arange(9), 4), 50, 51, 51], np.r_[np.ones(9, int), 3]])   # of two people
def test_pairs_of_held_back_people_are_what_they_say(labels):
    people = FaceSet('', np.arange(len(labels)), labels, None, None, [])
    fold = SimpleNamespace(public=people, validation=np.flatnonzero(labels % 2 == 1))
    held = held_back(fold, 500)
    a, b = labels[held.images[held.pairs]].T
    assert (labels[held.images] % 2 == 1).all() and held.same.mean() == 0.5
    assert len(held.same) == 1000
    np.testing.assert_array_equal(a == b, held.same)
    assert (held.pairs[:, 0] != held.pairs[:, 1]).all()
    held_labels = labels[labels % 2 == 1]
    several = [label for label in set(held_labels) if (held_labels == label).sum() > 1]
    assert set(a) == set(several) and set(b) == set(held_labels)
    assert set(held.pairs[held.same].ravel()) == set(np.flatnonzero(np.isin(held_labels, several)))


def test_the_floor_of_pixel_components_sees_pixels_and_ignores_the_common_light():
    faces = toy.draw(np.arange(80), np.arange(80), size=16).permute(0, 2, 3, 1).numpy()
    pairs = np.stack([np.arange(40), np.arange(40)], 1)
    pairs[20:, 1] = np.arange(40, 60)
    same = np.arange(40) < 20
    photos = (faces // 2 + 90).astype(np.uint8)
    both = np.concatenate([photos, photos // 16 * 16])           # the second photo: coarse grey
    sets = [PairSet('test', both, pairs + [0, 80], same, None)]
    found = verification.component_floor(faces, sets, False, 30)
    assert list(found) == ['test'] and found['test']['auc'] > 0.95


def test_a_centred_set_forgives_a_direction_common_to_all_its_pictures(monkeypatch):
    rng = np.random.default_rng(0)
    people = rng.normal(size=(300, 16))
    pairs = np.arange(600).reshape(-1, 2)
    other = rng.permutation(np.arange(300))
    same = np.arange(300) < 150
    person = np.stack([np.arange(300), np.where(same, np.arange(300), other)], 1).ravel()
    # Poor pictures keep less of their person, so in the common direction they seem alike
    own = (people[person] + 0.8 * rng.normal(size=(600, 16))) * rng.uniform(0.3, 1, (600, 1))
    seen = torch.nn.functional.normalize(torch.from_numpy(own + 6))
    monkeypatch.setattr(embed, 'unit_embeddings', lambda *a: seen)
    sets = [PairSet('test', np.zeros(600), pairs, same, None)]
    (plain, _), (both, curves) = (verification.verify(None, sets, SimpleNamespace(
        evaluate=SimpleNamespace(centred=centred)), 'cpu') for centred in (False, True))
    assert plain == {'test': both['test']} and len(both) == len(curves) == 2
    assert both['test centred']['auc'] > both['test']['auc'] + 0.05


def test_image_quality_of_known_images():
    rng = np.random.default_rng(0)
    photos = rng.integers(10, 246, (3, 32, 32, 3), dtype=np.uint8)
    equal = images.psnr_and_ssim(photos, photos, 'cpu')
    assert equal['ssim'] == pytest.approx(1) and equal['psnr'] > 100
    shifted = images.psnr_and_ssim(photos + 10, photos, 'cpu')
    assert shifted['psnr'] == pytest.approx(20 * np.log10(255 / 10))
    noise = rng.integers(0, 256, photos.shape, dtype=np.uint8)
    assert images.psnr_and_ssim(noise, photos, 'cpu')['ssim'] < 0.1


@pytest.mark.parametrize('what', [*hostile.bombs(), *hostile.lies()])
def test_a_checkpoint_that_promises_more_than_it_holds_is_refused(tmp_path, monkeypatch, what):
    (tmp_path / 'a.pt').write_bytes((hostile.bombs() | hostile.lies())[what])
    if what in hostile.bombs():
        monkeypatch.setattr(torch, 'load', lambda *_, **__: pytest.fail('it is loaded'))
    with pytest.raises(InputError, match='far more memory|safely|no zip|does not hold'):
        load_checkpoint(tmp_path / 'a.pt')


def test_a_sound_checkpoint_holds_what_was_saved(tmp_path):
    """Half floats, empty, of no dimension, shared, turned and cut, beside what others' trainings
    save."""
    whole = torch.arange(60.).view(3, 20)
    state = {'half': whole.bfloat16(), 'empty': torch.ones(0, 5), 'number': torch.tensor(3),
             'whole': whole, 'turned': whole.T, 'cut': whole[1:, ::3],
             'weight': torch.nn.Parameter(whole + 1)}
    plain = {'milestones': Counter([3, 5, 5]), 'size': whole.shape, 'people': {1, 2},
             'args': argparse.Namespace(lr=1.5, sets=['a', None])}
    torch.save({**state, **plain}, tmp_path / 'a.pt')
    loaded = load_checkpoint(tmp_path / 'a.pt')
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    assert all(loaded[key] == value for key, value in plain.items())


def test_pairs_come_from_a_bin_from_lfws_form_and_from_a_list_alike(tmp_path):
    drawn = toy.draw(np.arange(8) // 2, np.arange(8), 32)
    encoded = [images.encode(x, 'png') for x in drawn]
    people = [f'Person_{i // 2}' for i in range(8)]
    for i, content in enumerate(encoded):
        (tmp_path / 'lfw' / people[i]).mkdir(parents=True, exist_ok=True)
        (tmp_path / 'lfw' / people[i] / f'{people[i]}_{i % 2 + 1:04}.png').write_bytes(content)
    chosen = [(0, 1), (2, 3), (0, 2), (4, 7), (6, 7), (1, 6)] * 2
    same = [a // 2 == b // 2 for a, b in chosen]
    bins.write_bin(tmp_path / 'lfw.bin', [encoded[i] for pair in chosen for i in pair], same)
    lines = [f'{people[a]}\t{a % 2 + 1}\t{b % 2 + 1}' if s else
             f'{people[a]}\t{a % 2 + 1}\t{people[b]}\t{b % 2 + 1}'
             for (a, b), s in zip(chosen, same)]
    (tmp_path / 'lfw' / 'pairs.txt').write_text('10\t300\n' + '\n'.join(lines))
    first, other = (load_pairs(tmp_path / name, 32) for name in ('lfw.bin', 'lfw'))
    assert np.array_equal(first.images, other.images) and len(first.images) == 7
    assert np.array_equal(first.pairs, other.pairs) and np.array_equal(first.same, other.same)
    for text, words in (('Nobody\t1\t2\n' * 12, 'line 1 is no pair'),
                        ('10\t300\n' + '\n'.join([*lines, 'Person_0\t1']), 'line 14 is no pair')):
        (tmp_path / 'lfw' / 'pairs.txt').write_text(text)
        with pytest.raises(InputError, match=words):
            load_pairs(tmp_path / 'lfw', 32)


@pytest.mark.parametrize('form, yes, no', [
    ('{} {} {}', '1', '0'), ('{}, {}, {}', 'True', 'false'), ('{},{},{}', '1', '-1')])
def test_a_list_of_pairs_may_be_written_in_many_ways(tmp_path, form, yes, no):
    for i, image in enumerate(toy.draw(np.arange(4), np.arange(4), 32)):
        (tmp_path / f'Jörg{i}.png').write_bytes(images.encode(image, 'png'))
    lines = [form.format('Jörg0.png', 'Jörg1.png', yes), '', form.format(
        'Jörg2.png', 'Jörg3.png', no), '']
    (tmp_path / 'list.txt').write_text('\n'.join(lines), encoding='utf-8-sig')
    assert pairs.read_pairs(tmp_path / 'list.txt')[1].tolist() == [True, False]


@pytest.mark.parametrize('line, words', [
    ('Jorg 0.png Jorg 1.png 1', 'line 1 is no pair'),
    ('a.png b.png 1', 'a.png.*, which is not there'), ('\udce4.png b.png 1', 'no text in UTF-8')])
def test_a_list_that_is_unclear_is_refused_with_the_cause(tmp_path, line, words):
    (tmp_path / 'list.txt').write_bytes(line.encode(errors='surrogateescape'))
    with pytest.raises(InputError, match=words):
        pairs.read_pairs(tmp_path / 'list.txt')
