"""A leak check of sets without partners finds planted copies, and no more."""
import json

import numpy as np
import pytest
import torch
from test_data import make_config

from conftest import run
from facekit.data import images, toy
from facekit.data.faces import load
from facekit.data.records import write_records
from facekit.nets.embed import Embedder
from facekit.privacy.leak import find_leak, nearest_of


def write_set(root, first, people, each=2, planted=()):
    """Records of drawn people numbered from `first`, and beside them `planted` pictures."""
    person = first + np.arange(people * each) // each
    drawn = [images.encode(x, 'png') for x in toy.draw(person, np.arange(len(person)), 32)]
    labels = [*np.arange(people * each) // each, *(people + np.arange(len(planted)))]
    write_records(root, [*drawn, *planted], labels, 32)


def test_planted_copies_are_found_and_nobody_else(tmp_path):
    write_set(tmp_path / 'originals', 0, 60)
    cfg = make_config(tmp_path)
    originals = load(tmp_path / 'originals', cfg, photos=False)
    noise = np.random.default_rng(0).normal(0, 4, (6, 32, 32, 3))
    copied = originals.images[np.arange(0, 120, 20)].numpy()
    copies = (copied + noise).clip(0, 255).astype(np.uint8)
    planted = [images.encode(torch.from_numpy(x).permute(2, 0, 1), 'png') for x in copies]
    write_set(tmp_path / 'clean', 500, 40)
    write_set(tmp_path / 'leaks', 500, 40, planted=planted)
    embedder = Embedder('pixels', None, cfg, torch.device('cpu'))
    clean, leaks = (find_leak(embedder, load(tmp_path / name, cfg, photos=False), originals)
                    for name in ('clean', 'leaks'))
    assert clean.figures()['beyond'] <= 1 and clean.figures()['images'] == 80
    assert leaks.figures()['beyond'] == clean.figures()['beyond'] + 6
    surest = leaks.surest(6)
    assert sorted(surest) == list(range(80, 86))
    assert sorted(leaks.nearest[surest]) == list(range(0, 120, 20))
    assert leaks.figures()['highest'] > 0.98 > leaks.figures()['limit']


def test_the_nearest_is_that_of_a_full_sort_and_nobody_is_compared_with_himself():
    z = torch.nn.functional.normalize(torch.randn(50, 4, generator=torch.manual_seed(0)))
    person = torch.arange(50) // 5
    cosine, place = nearest_of(z, z)
    assert (place == np.arange(50)).all() and cosine == pytest.approx(1)
    cosine, place = nearest_of(z, z, person, person)
    for i in range(50):
        others = np.flatnonzero(person != person[i])
        expected = (z[others] @ z[i]).max()
        assert cosine[i] == pytest.approx(expected.item()) and place[i] in others


def test_evaluate_checks_a_set_without_partners(copied):
    folder = copied
    write_set(folder / 'synthetic', 900, 8)
    said = run(folder, 'evaluate.py', f'release={folder}/synthetic', f'originals={folder}/faces',
               'evaluate.partners=false', 'evaluate.sets=[]')
    found = json.loads((folder / 'run' / 'external.json').read_text())['leak']
    assert found.keys() == {'judge', 'pixels'}
    assert found['judge']['images'] == 16 and found['judge']['originals'] == 144
    assert 'pixels: ' in said and ' of 16 images' in said
    assert (folder / 'run' / 'figures' / 'external_leak_judge.png').exists()
    assert 'give both' in run(folder, 'evaluate.py', f'release={folder}/synthetic',
                              'evaluate.partners=false', 'evaluate.sets=[]', code=2)
