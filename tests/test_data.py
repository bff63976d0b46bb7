"""Cache, splits, order and random numbers of a data set."""
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from facekit import attack_data, batches, config, faces, images, keys, protect, records, split
from facekit import sources, toy
from facekit.errors import InputError
from facekit.protect import FaceMAE, Protection

TINY = Path(__file__).parent / 'tiny.yaml'


def make_config(folder, *assignments):
    cfg = config.namespace(config.resolve(TINY, [
        f'run.folder={folder}/run', f'data.root={folder}/faces', f'data.cache={folder}/cache',
        *assignments]))
    return config.variants(cfg, compare=False)[0].cfg


def write_faces(folder, people=8, each=3, form='png', start=0):
    numbers = np.arange(people).repeat(each) + start, np.tile(np.arange(each), people)
    pixels = toy.draw(*numbers, size=32)
    encoded = [images.encode(x, form) for x in pixels]
    records.write_records(folder, encoded, numbers[0] - start, 32)
    return pixels


def test_cache_holds_the_decoded_images_and_follows_its_source(tmp_path):
    cfg = make_config(tmp_path)
    pixels = write_faces(tmp_path / 'faces')
    found = faces.load(tmp_path / 'faces', cfg)
    assert np.array_equal(found.images, pixels.permute(0, 2, 3, 1))
    built = (tmp_path / 'cache').rglob('images.u8')
    first = next(built).stat().st_ino
    faces.load(tmp_path / 'faces', cfg)
    assert next((tmp_path / 'cache').rglob('images.u8')).stat().st_ino == first   # not rebuilt
    pixels = write_faces(tmp_path / 'faces', start=50)
    assert np.array_equal(faces.load(tmp_path / 'faces', cfg).images, pixels.permute(0, 2, 3, 1))


def test_a_cache_that_was_not_finished_or_was_damaged_is_built_again(tmp_path):
    cfg = make_config(tmp_path)
    pixels = write_faces(tmp_path / 'faces').permute(0, 2, 3, 1)
    faces.load(tmp_path / 'faces', cfg)
    folder = next((tmp_path / 'cache').glob('*/'))
    for damage in ('source.json', 'hashes.npy', 'images.u8'):
        os.truncate(folder / damage, (folder / damage).stat().st_size // 2)
        assert np.array_equal(faces.load(tmp_path / 'faces', cfg).images, pixels)


def test_runs_that_start_together_decode_a_set_once(tmp_path, monkeypatch, capsys):
    cfg = make_config(tmp_path)
    pixels = write_faces(tmp_path / 'faces').permute(0, 2, 3, 1)
    built, read = [], sources.RecordSource.read

    def slow(source, i):
        time.sleep(0.05)
        built.append(i)
        return read(source, i)

    monkeypatch.setattr(sources.RecordSource, 'read', slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: faces.load(tmp_path / 'faces', cfg).images, range(3)))
    assert all(np.array_equal(images, pixels) for images in found)
    assert sorted(built) == list(range(len(pixels)))
    assert 'waiting for it' in capsys.readouterr().out


def test_streamed_images_are_the_cached_ones_and_split_alike(tmp_path, capsys):
    write_faces(tmp_path / 'faces', form='jpeg')
    cached, streamed = (split.split(make_config(
        tmp_path / way, f'data.root={tmp_path}/faces', 'toy.identities=0', f'data.decode={way}'))
        for way in ('cache', 'stream'))
    assert 'decoded whenever they are read' in capsys.readouterr().out
    assert isinstance(streamed[0].public.images, faces.StreamedImages)
    assert not list((tmp_path / 'stream').rglob('images.u8'))
    assert split.private_digest(cached) == split.private_digest(streamed)
    stores = [batches.Store(f[0].public.select(f[0].mae), torch.device('cpu'))
              for f in (cached, streamed)]
    choices = [np.array([3, 0, 5]), np.array([1]), np.array([4, 4])]
    for one, other, rows in zip(*(s.ahead(choices) for s in stores), choices):
        assert torch.equal(one, other) and torch.equal(one, stores[1](rows))


def test_a_set_is_cached_where_it_fits_or_is_already(tmp_path, monkeypatch):
    def ways(*assignments, folder='one'):
        cfg = make_config(tmp_path / folder, f'data.root={tmp_path}/faces', *assignments)
        return isinstance(faces.load(tmp_path / 'faces', cfg, photos).images, np.memmap)

    write_faces(tmp_path / 'faces')
    photos, needed = True, 8 * 3 * 32 * 32 * 3
    usage = shutil.disk_usage('/')
    for free, fits in ((4 * needed - 1, False), (4 * needed, True), (0, True)):
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=free))
        assert ways() == fits                                # the last: it is there already
    assert not ways('data.decode=stream') and ways('data.decode=cache', folder='two')
    photos = False
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1 << 40))
    monkeypatch.setattr(faces, 'RELEASE', needed - 1)
    assert not ways(folder='three')


def test_what_an_older_cache_calls_its_images_stays(tmp_path):
    """Checkpoints and releases were made with it."""
    write_faces(tmp_path / 'faces')
    cfg = make_config(tmp_path)
    faces.load(tmp_path / 'faces', cfg)
    [path] = (tmp_path / 'cache').rglob('hashes.npy')
    np.save(path, older := np.load(path) + 1)
    for way in ('cache', 'stream'):
        cfg.data.decode = way
        assert np.array_equal(faces.load(tmp_path / 'faces', cfg).hashes, older)


def test_a_folder_per_person_is_read_like_records(tmp_path):
    cfg = make_config(tmp_path)
    pixels = toy.draw(np.arange(4), np.zeros(4, int), size=32)
    for i, x in enumerate(pixels):
        person = tmp_path / 'faces' / f'person {i // 2}'
        person.mkdir(parents=True, exist_ok=True)
        (person / f'{i}.png').write_bytes(images.encode(x, 'png'))
    found = faces.load(tmp_path / 'faces', cfg)
    assert np.array_equal(found.images, pixels.permute(0, 2, 3, 1))
    assert found.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('make, words', [
    (lambda f: None, ['faces', 'does not exist', 'data.root']),
    (lambda f: write_faces(f) is None or (f / 'train.idx').unlink(), ['train.idx']),
    (lambda f: records.write_records(f, [b'no image'] * 2, [0, 1], 32),
     ['train.rec record 1', 'data.on_corrupt=skip']),
    (lambda f: records.write_records(
        f, [images.encode(torch.zeros(3, 40, 32, dtype=torch.uint8))] * 2, [0, 1], 32),
     ['32x40', 'data.on_size=resize'])])
def test_a_wrong_data_set_is_one_sentence(tmp_path, make, words):
    make(tmp_path / 'faces')
    with pytest.raises(InputError) as error:
        split.split(make_config(tmp_path, 'toy.identities=0'))
    assert all(word in str(error.value) for word in words), error.value


def test_damaged_images_are_named_and_left_out_where_the_config_says_so(tmp_path, capsys):
    cfg = make_config(tmp_path, 'data.on_corrupt=skip')
    pixels = toy.draw(np.arange(6) // 2, np.arange(6), size=32)
    encoded = [images.encode(x, 'png') for x in pixels]
    encoded[1], encoded[4] = encoded[1][:90], b'no image'
    records.write_records(tmp_path / 'faces', encoded, [0, 0, 1, 1, 2, 2], 32)
    for way in ('stream', 'stream', 'cache', 'cache'):     # when it is first looked at, and again
        cfg.data.decode = way
        found = faces.load(tmp_path / 'faces', cfg)
        kept = [0, 2, 3, 5]
        assert np.array_equal(found.images[:], pixels[kept].permute(0, 2, 3, 1))
        assert found.labels.tolist() == [0, 1, 1, 2] and found.skipped == [1, 4]
        printed = capsys.readouterr().out
        assert '2 damaged images left out' in printed
        assert len(set(found.hashes.tolist())) == 4
    [path] = (tmp_path / 'run' / 'log' / 'cache').iterdir()
    log = json.loads(path.read_text().splitlines()[-1])
    assert log['skipped'] == 2 and log['stage'].startswith('cache/faces')
    with pytest.raises(InputError, match='train.rec record 2: .*data.on_corrupt=skip'):
        faces.load(tmp_path / 'faces', make_config(tmp_path))


def test_folds_release_everybody_once_and_share_nobody(tmp_path):
    pixels = write_faces(tmp_path / 'faces', people=12)
    cfg = make_config(tmp_path, 'data.folds=3', 'data.release_folds=[]', 'data.validation=0.2',
                      'toy.identities=0', 'data.exclude=[5]')
    folds = split.split(cfg)
    labels = folds[0].public.labels
    assert sorted(np.concatenate([f.released for f in folds])) == [
        i for i in range(len(pixels)) if labels[i] != 5]
    for f in folds:
        groups = [set(labels[part]) for part in (f.released, f.train, f.validation)]
        assert set.union(*groups) == set(range(12)) - {5}
        assert sum(map(len, groups)) == 11 and all(groups)
    again = split.split(make_config(tmp_path, 'data.folds=3', 'data.release_folds=[]',
                                   'toy.identities=0', 'data.split_seed=1'))
    assert any(set(a.released) != set(b.released) for a, b in zip(folds, again))


def test_people_with_few_images_only_feed_the_mae(tmp_path):
    pixels = toy.draw(np.arange(20), np.arange(20), size=32)
    people = np.r_[np.arange(6).repeat(3), 6, 7]
    encoded = [images.encode(x, 'png') for x in pixels]
    records.write_records(tmp_path / 'faces', encoded, people, 32)
    fold = split.split(make_config(tmp_path, 'data.min_images=3', 'toy.identities=0'))[0]
    assert set(people[fold.mae]) - set(people[fold.train]) == {6, 7}
    assert not {6, 7} & set(people[fold.released])


def test_people_who_are_excluded_are_in_nothing(tmp_path):
    write_faces(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'data.exclude=[5]', 'reconstruct.method=none', 'toy.identities=0')
    folds = split.split(cfg)
    plan = protect.plan_release(folds, b'secret', cfg)
    [group] = attack_data.own_groups(cfg, folds, [None], folds[0].private, plan, 'cpu')
    labels, [f] = folds[0].private.labels, folds
    for rows in (f.released, f.train, f.mae, f.validation, group.outsiders.rows):
        assert 5 not in labels[rows]
    assert len(group.outsiders)


def test_a_picture_that_is_public_and_private_stops_the_run(tmp_path):
    write_faces(tmp_path / 'faces')
    write_faces(tmp_path / 'other', start=7)                 # person 7 is in both sets
    cfg = make_config(tmp_path, f'data.public={tmp_path}/other', 'toy.identities=0')
    both = (r'record 2 \(public, of 0\) is the same picture as \S+train.rec record 23 '
            r'\(private, of 7\), 3 such')
    with pytest.raises(InputError, match=both):
        split.split(cfg)
    fold = split.split(make_config(tmp_path, f'data.public={tmp_path}/other', 'toy.identities=0',
                                  'data.exclude=[7]'))[0]
    assert len(fold.released) == 21 and len(fold.train) == 24


def test_order_visits_every_image_once_an_epoch():
    order = batches.Order(50, 10, 3, 'mae.batch')
    epochs = [np.concatenate([order(5 * e + i)[0] for i in range(5)]) for e in range(2)]
    assert all(sorted(e) == list(range(50)) for e in epochs) and any(epochs[0] != epochs[1])
    twin = batches.Order(50, 10, 3, 'mae.batch')                         # a pure function
    assert np.array_equal(twin(7)[0], order(7)[0])
    with pytest.raises(InputError, match='larger than'):
        batches.Order(5, 10, 3, 'mae.batch')


def test_balanced_batches_hold_k_images_of_each_person():
    labels = np.repeat(np.arange(6), [1, 2, 3, 4, 9, 12])
    order = batches.Order(len(labels), 8, 0, 'mae.batch', labels, per_identity=4)
    with pytest.raises(InputError, match='does not divide by irm.images_per_identity = 4'):
        batches.Order(len(labels), 10, 0, 'mae.batch', labels, per_identity=4)
    for step in range(6):
        people, counts = np.unique(labels[order(step)[0]], return_counts=True)
        assert (counts % 4 == 0).all()


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


def test_runs_that_start_together_share_one_secret(tmp_path, monkeypatch):
    draw = keys.secrets.token_hex
    monkeypatch.setattr(keys.secrets, 'token_hex', lambda n: (time.sleep(0.1), draw(n))[1])
    cfg = make_config(tmp_path, 'reconstruct.key=')
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: keys.release_secret(cfg), range(3)))
    assert len(found) == 1 and len(found.pop()) == 32


def test_the_public_secret_of_the_demo_protects_nobody_else(tmp_path):
    """Who knows it could compute masks, order and labels of the release."""
    cfg = make_config(tmp_path, f'reconstruct.key={config.CONFIGS / "toy.key"}')
    write_faces(tmp_path / 'faces')
    with pytest.raises(InputError, match='known to everybody'):
        keys.release_secret(cfg)
    (tmp_path / 'faces' / 'toy.bin').touch()
    with pytest.raises(InputError, match='known to everybody'):
        keys.release_secret(cfg)
    shutil.rmtree(tmp_path / 'faces')
    toy.draw_set(tmp_path / 'faces', 2, 2, 2, 10, size=16, seed=0)
    assert len(keys.release_secret(cfg)) == 32


def test_release_order_is_secret_and_complete(tmp_path):
    write_faces(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'data.release_folds=[]', 'toy.identities=0')
    folds = split.split(cfg)
    source = folds[0].public.labels
    plan = protect.plan_release(folds, b'secret', cfg)
    assert sorted(plan.image) == list(range(24)) and (np.diff(plan.label) >= 0).all()
    # One new label a person
    assert len({(a, b) for a, b in zip(source[plan.image], plan.label)}) == plan.people == 8
    assert (source[plan.image] != np.sort(source)).any()
    assert all(i in folds[k].released for k, i in zip(plan.fold, plan.image))
    other = protect.plan_release(folds, b'another', cfg)
    assert (other.image != plan.image).any()
    cfg.reconstruct.images_per_person = 2
    assert split.count_release(folds, cfg).images == 2 * plan.people
    capped = protect.plan_release(folds, b'secret', cfg)
    assert np.bincount(capped.label).tolist() == [2] * 8


@pytest.mark.parametrize('paste', ['true', 'false'])
@pytest.mark.parametrize('method', ['facemae', 'mask'])
def test_hidden_pixels_do_not_reach_the_release(tmp_path, method, paste):
    cfg = make_config(tmp_path, f'reconstruct.method={method}',
                      f'reconstruct.paste_visible={paste}')
    torch.manual_seed(0)
    model = protect.build_mae(cfg.mae, 32).eval()
    protection = Protection(cfg, FaceMAE(model, torch.rand(3, 32, 32), 0.25))
    originals = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    seeds = batches.image_seeds(9, torch.arange(5))
    noise = protection.patch_noise(seeds, 32)
    grey = protect.masked(torch.zeros(5, 3, 32, 32), noise, 0.75, 8)
    hidden = (grey > 0).permute(0, 2, 3, 1)
    changed = torch.where(hidden, 255 - originals, originals)
    assert (changed != originals).float().mean() > 0.7
    released = [protection(x, seeds) for x in (originals, changed)]
    assert torch.equal(*released)
    if method == 'mask' or paste == 'true':                      # what is visible is there
        assert torch.equal(released[0][~hidden], originals[~hidden])


@pytest.mark.parametrize('method', ['facemae', 'mask', 'blur', 'pixelate', 'noise', 'none'])
def test_methods_treat_an_image_alike_in_every_batch(tmp_path, method):
    cfg = make_config(tmp_path, f'reconstruct.method={method}', 'reconstruct.pixelate_block=5')
    model = protect.build_mae(cfg.mae, 32).eval()
    protection = Protection(cfg, FaceMAE(model, torch.rand(3, 32, 32), 0.25))
    originals = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    seeds = batches.image_seeds(4, torch.tensor([5, 9, 2, 7, 1, 3]))
    whole = protection(originals, seeds)
    alone = torch.cat([protection(originals[i:i + 1], seeds[i:i + 1]) for i in range(6)])
    assert (whole.int() - alone.int()).abs().max() <= 1
    assert torch.equal(whole, originals) == (method == 'none')


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
