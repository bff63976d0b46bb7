
"""How a set is looked at and decoded, splits, order and random numbers."""
import json
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from facekit.base import config, machine, process
from facekit.base.errors import InputError
from facekit.data import batches, faces, images, pairs, records, toy
from facekit.data.names import excluded_people
from facekit.data.people import split
from facekit.data.sources import RecordSource, open_source
from facekit.privacy.groups import AttackGroup, keep_images, own_groups
from facekit.privacy.release import plan_release, release_secret

TINY = Path(__file__).parent / 'tiny.yaml'


def make_config(folder, *assignments):
    cfg = config.namespace(config.resolve(TINY, [
        f'run.folder={folder}/run', f'data.root={folder}/faces', *assignments]))
    return config.variants(cfg, compare=False)[0].cfg


def write_faces(folder, people=8, each=3, form='png', start=0):
    numbers = np.arange(people).repeat(each) + start, np.tile(np.arange(each), people)
    pixels = toy.draw(*numbers, size=32)
    encoded = [images.encode(x, form) for x in pixels]
    records.write_records(folder, encoded, numbers[0] - start, 32)
    return pixels


def test_a_set_is_looked_at_again_only_when_it_changes_or_the_look_is_damaged(tmp_path):
    cfg, hashes = make_config(tmp_path), []
    for start in (0, 50):
        pixels = write_faces(tmp_path / 'faces', start=start).permute(0, 2, 3, 1)
        first, [look] = faces.load(tmp_path / 'faces', cfg), (tmp_path / 'run/looks').glob('*.npz')
        assert np.array_equal(first.images[:], pixels)
        made = look.stat().st_ino
        hashes.append(faces.load(tmp_path / 'faces', cfg).hashes.tolist())
        assert hashes[-1] == first.hashes.tolist() and look.stat().st_ino == made
    assert not set(hashes[0]) & set(hashes[1])
    x = look.read_bytes()
    for damaged in (b'', x[:len(x) // 2], bytes(len(x)),
                    x.replace(x[x.index(b'hashes.npy') + 150:][:9], b'012345678', 1)):
        assert damaged != x
        look.write_bytes(damaged)
        assert faces.load(tmp_path / 'faces', cfg).hashes.tolist() == hashes[-1]


def test_runs_that_start_together_look_at_a_set_once_and_share_one_secret(tmp_path, monkeypatch,
                                                                          capsys):
    cfg = make_config(tmp_path)
    write_faces(tmp_path / 'faces')
    looked_at, read, draw = [], RecordSource.read, secrets.token_hex

    def slow(source, i):
        time.sleep(0.02)
        looked_at.append(i)
        return read(source, i)

    monkeypatch.setattr(RecordSource, 'read', slow)
    monkeypatch.setattr(secrets, 'token_hex', lambda n: (time.sleep(0.1), draw(n))[1])
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: (faces.load(tmp_path / 'faces', cfg).hashes.tobytes(),
                                        release_secret(cfg)), range(3)))
    assert len(found) == 1 and len(found.pop()[1]) == 32
    assert sorted(looked_at) == list(range(24))
    assert 'waiting for it' in capsys.readouterr().out


@pytest.mark.parametrize('free, processes, keep, decoded, said', [
    (10, 1, True, 6, 'decoded as they are read'), (10.1, 1, False, 6, None),
    (10.1, 1, True, 5, 'decoded into memory'), (20.1, 2, True, 5, 'decoded into memory')])
def test_what_fits_into_memory_is_decoded_once(tmp_path, monkeypatch, capsys, free, processes,
                                               keep, decoded, said):
    """`free`: room, in images, of which five are kept and six read."""
    pixels = write_faces(tmp_path / 'faces').permute(0, 2, 3, 1)
    found = faces.load(tmp_path / 'faces', make_config(tmp_path))
    calls, decode, rows = [], images.decode, np.array([7, 2, 9, 3, 23])
    monkeypatch.setattr(images, 'decode', lambda *x: (calls.append(x), decode(*x))[1])
    monkeypatch.setattr(process, 'free_memory', lambda device: free * 32 * 32 * 3)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    capsys.readouterr()
    for turn in range(2):                            # the second says nothing new
        if keep:
            found.images.keep(rows, torch.device('cpu'))
        store = batches.Store(found.select(rows), torch.device('cpu'))
        choices = [np.array([3, 0, 4]), np.array([1]), np.array([4, 4])]
        for batch, chosen in zip(store.ahead(choices), choices, strict=True):
            assert torch.equal(batch, pixels[rows[chosen]])
        assert len(calls) == (decoded if decoded == 5 else decoded * (turn + 1))
        assert capsys.readouterr().out == (
            f'{tmp_path}/faces/train.rec: 5 images, 0.0 MB: {said}\n'
            if said and not turn else '')


def test_a_folder_per_person_is_read_like_records_and_its_rows_decoded_together(tmp_path, capsys):
    drawn = toy.draw(np.arange(6), np.zeros(6, int), size=32)
    pixels = drawn.permute(0, 2, 3, 1).numpy()
    for i, x in enumerate(drawn):
        person = tmp_path / 'faces' / f'person {i // 3}'
        person.mkdir(parents=True, exist_ok=True)
        (person / f'{i}.png').write_bytes(images.encode(x, 'png'))
    found = faces.load(tmp_path / 'faces', make_config(tmp_path))
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    released, originals, pairs = (
        found.select(np.array(rows, int)) for rows in ([1, 2], [2, 3], []))
    group = AttackGroup(released, originals, np.arange(2), np.arange(2), pairs, np.arange(0))
    capsys.readouterr()
    keep_images([group, group])
    assert found.images.has(np.arange(1, 4)) and not found.images.has(np.array([0, 1]))
    assert '3 images' in capsys.readouterr().out
    for rows in (slice(None), np.arange(1, 4), np.array([5, 0, 5])):      # in memory, not, in part
        assert np.array_equal(found.images[rows], pixels[rows])


def write_images(folder, count=6):
    """Image files 0.png, 1.png, ... of as many drawn people in a folder; returns their pixels."""
    drawn = toy.draw(np.arange(count), np.zeros(count, int), size=32)
    folder.mkdir()
    for i, image in enumerate(drawn):
        (folder / f'{i}.png').write_bytes(images.encode(image, 'png'))
    return drawn.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('text', [
    '2.png 9\n0.png 10\n\n1.png  10\n', '\ufeff2.png,9\r\n0.png, 10\r\n./1.png,10\r\n',
    '0.png\t10\n1.png\t10\n2.png\t9'])
def test_a_list_says_who_is_who_and_what_it_leaves_out_is_counted(tmp_path, capsys, text):
    pixels = write_images(tmp_path / 'faces')
    path = tmp_path / 'faces' / 'identity_CelebA.txt'
    path.write_text(text)
    found = faces.load(path, make_config(tmp_path))
    assert found.people.tolist() == ['10', '9'] and found.labels.tolist() == [0, 0, 1]
    assert np.array_equal(found.images[:], pixels[:3])
    assert found.left_out()['in no line of the list'] == 3
    assert 'in no line of the list: 3 (3.png, 4.png, 5.png)' in capsys.readouterr().out


def test_a_lists_names_can_have_blanks_and_its_images_lie_in_sub_folders(tmp_path):
    write_images(tmp_path / 'faces')
    (tmp_path / 'list.txt').write_text('faces/0.png, Müller Jörg\nfaces/1.png, ann\n')
    cfg = make_config(tmp_path, f'data.root={tmp_path}/list.txt', 'data.exclude=[ann]')
    found = faces.load(cfg.data.root, cfg)
    assert found.people.tolist() == ['Müller Jörg', 'ann']
    assert excluded_people(found.people, cfg).tolist() == [False, True]
    assert pairs.find_set('0.png', make_config(tmp_path)) == tmp_path / 'faces' / '0.png'


@pytest.mark.parametrize('text, words', [
    ('0.png a\n1.png\n', 'line 2 is no image and its person'),
    ('0.png, \n', 'line 1 is no image and its person'),
    ('0.png Li Ann\n', 'names with blanks need a comma'),
    ('0.png a\n7.png b\n', "7.png', which is not there: copy it there, or remove the line"),
    (f'0.png a\n{"x" * 5000}.png b\n', "x ..., which is not there"),
    ('0.png a\n/x/\0.png b\n', 'outside'), ('x\0.png b\n', 'which is not there'),
    ('0.png a\n./0.png b\n', 'line 2 names .*0.png once more'),
    ('a/../../x.png a\n', "line 1 names '../x.png', outside"),
    ('/x.png a\n', 'outside'), ('\n', 'names no image'),
    ('0.png a\n1.png a\n', 'one person only'), ('0.png é\n', 'no text in UTF-8'),
    ('0.png Ann\n1.png ann\n', 'look alike')])
def test_a_list_with_a_wrong_line_is_refused_in_one_sentence(tmp_path, text, words):
    write_images(tmp_path / 'faces')
    path = tmp_path / 'faces' / 'list.txt'
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(InputError, match=words) as error:
        open_source(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_records_of_one_label_take_their_people_from_dcfaces_list(tmp_path):
    drawn = toy.draw(np.arange(4), np.zeros(4, int), size=32)
    records.write_records(tmp_path, [images.encode(x) for x in drawn], [0] * 4, 32)
    keys, path = RecordSource(tmp_path).records.keys, tmp_path / 'list.txt'
    lines = [f'{key}\t{person}/{key}.jpg\n' for key, person in zip(keys, (7, 7, 12, 7))]
    path.write_text(''.join(lines[::-1]))
    source = open_source(tmp_path / 'train.rec')
    assert source.people[source.labels].tolist() == ['7', '7', '12', '7']
    for text, words in ((''.join(lines[:2]), f'no line for record {keys[2]} of'),
                        ('1 a/b.jpg\n', 'line 1 is not'), ('1\tb.jpg\n', 'line 1 is not'),
                        ('1\t../a/b.jpg\n', 'line 1 is not'),
                        ('1\ta/1.jpg\n1\tb/1.jpg\n', 'line 2 names its record once more'),
                        ('1\tann/1.jpg\n2\tx/../Ann/2.jpg\n3\ta/3.jpg\n4\ta/4.jpg\n',
                         "'Ann' and 'ann', which look alike")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            open_source(tmp_path / 'train.rec')


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / 'memory.current').write_text('700\n')
    (tmp_path / 'memory.stat').write_text('anon 400\ninactive_file 300\n')
    for limit, left in (('1000\n', 600), ('max\n', float('inf'))):
        (tmp_path / 'memory.max').write_text(limit)
        assert machine.left_in(tmp_path) == left
    assert machine.left_in(tmp_path / 'none') == float('inf')
    assert 0 < process.free_memory(torch.device('cpu')) < 1 << 50


def test_damaged_images_are_named_and_left_out_where_the_config_says_so(tmp_path, capsys):
    cfg = make_config(tmp_path, 'data.on_corrupt=skip')
    pixels = toy.draw(np.arange(6) // 2, np.arange(6), size=32)
    encoded = [images.encode(x, 'png') for x in pixels]
    encoded[1], encoded[4] = encoded[1][:90], b'no image'
    records.write_records(tmp_path / 'faces', encoded, [0, 0, 1, 1, 2, 2], 32)
    for _ in range(2):                     # when it is first looked at, and from the look's file
        found = faces.load(tmp_path / 'faces', cfg)
        assert np.array_equal(found.images[:], pixels[[0, 2, 3, 5]].permute(0, 2, 3, 1))
        assert found.labels.tolist() == [0, 1, 1, 2] and found.skipped == [1, 4]
        assert found.where(3).endswith('record 6') and len(set(found.hashes.tolist())) == 4
        assert '2 damaged images left out' in capsys.readouterr().out
    [path] = (tmp_path / 'run' / 'log' / 'look').iterdir()
    log = json.loads(path.read_text().splitlines()[-1])
    assert log['skipped'] == 2 and log['stage'].startswith('look/faces')
    with pytest.raises(InputError, match='train.rec record 2: .*data.on_corrupt=skip'):
        faces.load(tmp_path / 'faces', make_config(tmp_path))
    records.write_records(tmp_path / 'faces', encoded[1:2] * 2, [0, 1], 32)
    with pytest.raises(InputError, match='not one image can be read'):
        faces.load(tmp_path / 'faces', cfg)
    tall = images.encode(torch.zeros(3, 40, 32, dtype=torch.uint8))
    records.write_records(tmp_path / 'faces', [tall] * 2, [0, 1], 32)
    with pytest.raises(InputError, match='32x40 .*data.on_size=resize'):
        faces.load(tmp_path / 'faces', cfg)


def test_folds_release_everybody_once_and_share_nobody(tmp_path):
    """Who is excluded is in nothing, who has few images only feeds the MAE."""
    people = np.r_[np.arange(12).repeat(3), 12, 13]
    pixels = toy.draw(people, np.arange(38), size=32)
    encoded = [images.encode(x, 'png') for x in pixels]
    records.write_records(tmp_path / 'faces', encoded, people, 32)

    def folds_of(*assignments):
        cfg = make_config(tmp_path, 'data.folds=3', 'data.release_folds=[]', 'data.exclude=[5]',
                          'data.min_images=3', 'reconstruct.method=none', *assignments)
        return cfg, split(cfg)

    cfg, folds = folds_of('data.validation=0.2')
    assert sorted(np.concatenate([f.released for f in folds])) == [
        i for i in range(36) if people[i] != 5]
    plan = plan_release(folds, b'secret', cfg)
    groups = own_groups(cfg, folds, [None] * 3, folds[0].private, plan, 'cpu')
    for f in folds:
        parts = [set(people[rows]) for rows in (f.released, f.train, f.validation)]
        assert set.union(*parts) == set(range(12)) - {5}
        assert sum(map(len, parts)) == 11 and all(parts)
        assert {12, 13} >= set(people[f.mae]) - set(people[f.train])
        assert 5 not in people[f.mae]
    assert sorted(people[np.concatenate([g.outsiders.rows for g in groups])]) == [12, 13]
    assert all({12, 13} <= set(people[f.mae]) for f in folds_of()[1])
    again = folds_of('data.split_seed=1')[1]
    assert any(set(a.released) != set(b.released) for a, b in zip(folds, again))


def test_a_picture_that_is_public_and_private_stops_the_run(tmp_path):
    write_faces(tmp_path / 'faces')
    write_faces(tmp_path / 'other', start=7)                 # person 7 is in both sets
    cfg = make_config(tmp_path, f'data.public={tmp_path}/other', 'toy.identities=0')
    both = (r'record 2 \(public, of 0\) is the same picture as \S+train.rec record 23 '
            r'\(private, of 7\), 3 such')
    with pytest.raises(InputError, match=both):
        split(cfg)
    fold = split(make_config(tmp_path, f'data.public={tmp_path}/other', 'toy.identities=0',
                             'data.exclude=[7]'))[0]
    assert len(fold.released) == 21 and len(fold.train) == 24


def test_order_visits_every_image_once_an_epoch():
    order, twin = (batches.Order(50, 10, 3, 'mae.batch') for _ in range(2))
    epochs = [np.concatenate([order(5 * e + i)[0] for i in range(5)]) for e in range(2)]
    assert all(sorted(e) == list(range(50)) for e in epochs) and any(epochs[0] != epochs[1])
    assert np.array_equal(twin(7)[0], order(7)[0])                       # a pure function
    with pytest.raises(InputError, match='larger than'):
        batches.Order(5, 10, 3, 'mae.batch')


def test_hashes_depend_on_image_epoch_and_seed_alone():
    images = torch.tensor([3, 1, 4, 159])
    start = batches.stream(7, 'masks', 2)
    whole = batches.hashed(start, images, 64)
    assert torch.equal(batches.hashed(start, images[2:3], 64)[0], whole[2])
    others = [(7, 'masks', 3), (8, 'masks', 2), (7, 'flips', 2)]
    assert not any(torch.equal(batches.hashed(batches.stream(*o), images, 64), whole)
                   for o in others)
    many = batches.hashed(batches.stream(0, 'masks'), torch.arange(2000), 64)
    assert len(many.unique()) == 128000
    u = batches.uniform(batches.hashed(batches.stream(1, 'masks'), torch.arange(4000), 64))
    # Mean, variance and correlation with the neighbouring image and column, at five sigma
    assert abs(u.mean() - 0.5) < 0.003 and abs(u.var() - 1 / 12) < 0.003
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01


def test_faces_off_the_template_are_noticed(capsys):
    rng = np.random.default_rng(0)
    photos = np.full((60, 112, 112, 3), 170.0) + rng.normal(0, 5, (60, 112, 112, 3))
    photos[:, :20], photos[:, :, :12], photos[:, 105:] = 60, 90, 90
    for x in (38, 74):
        photos[:, 47:57, x - 7:x + 8] = 40                    # dark where the template has eyes
    faces.warn_if_unaligned(photos.astype(np.uint8), 'here')
    assert not capsys.readouterr().out
    faces.warn_if_unaligned(np.roll(photos, 15, 1).astype(np.uint8), 'there')
    assert 'there do not look aligned' in capsys.readouterr().out
    for few in (photos[:1], np.roll(photos, 15, 1)[:5]):      # neither alarm nor silence
        faces.warn_if_unaligned(few.astype(np.uint8), 'few')
        printed = capsys.readouterr().out
        assert 'too few to tell' in printed and 'eyes at 38,52' in printed
        assert 'warning' not in printed
