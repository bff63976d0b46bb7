"""A release: its secret, its plan, what it hides, and what is checked before it appears."""
import hashlib
import json
import os
import shutil
import stat
import zlib

import numpy as np
import pytest
import torch
from test_data import make_config, write_faces
from test_people import folder_of_people

import train_mae
from conftest import TINY, run
from facekit.base import config, files
from facekit.base.errors import InputError
from facekit.data import batches, images, records, toy
from facekit.data.people import count_release, split
from facekit.privacy import contents, protect
from facekit.privacy.groups import Owned
from facekit.privacy.protect import FaceMAE, Protection
from facekit.privacy.release import (
    PlannedRelease,
    is_public,
    key_of,
    plan_release,
    read_secret,
    release_secret,
)

CPU = torch.device('cpu')
SECRET = hashlib.sha256(b'a secret of these tests').digest()
FACTS = {'method': 'mask', 'made_by': 'FaceMAE kit version 2.0'}
TEXT = b'\0\0\0\x05tEXtA\0Ann' + zlib.crc32(b'tEXtA\0Ann').to_bytes(4)       # a chunk of a PNG


# -------------------------------------------------------------------------------- the secret

@pytest.mark.parametrize('text', [
    b'password', bytes(range(0, 248, 8)).hex().encode(), b'0123456789abcdef' * 4,
    bytes(range(0, 96, 3)).hex().encode(), 2 * (config.CONFIGS / 'toy.key').read_bytes().strip(),
    np.random.default_rng(0).bytes(3000).hex().encode(),
    b'correct horse battery staple, Ann'.hex().encode()],
    ids=['no hex', '31 bytes', 'few bytes', 'counting', 'repeated', 'large', 'words'])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path, text):
    (tmp_path / 'my.key').write_bytes(text)
    with pytest.raises(InputError, match='64 hex digits'):
        read_secret(tmp_path / 'my.key')


@pytest.mark.parametrize('make', [
    os.mkdir, os.mkfifo, lambda path: path.symlink_to('/dev/zero')])
def test_a_secret_that_cannot_be_read_is_not_called_missing(tmp_path, make):
    """Who followed that would delete it, and with it all that matches releases and originals."""
    make(tmp_path / 'my.key')
    with pytest.raises(InputError, match='cannot be read') as error:
        read_secret(tmp_path / 'my.key')
    assert 'delete' not in str(error.value)


def test_what_follows_from_the_public_secret_is_as_public():
    text = (config.CONFIGS / 'toy.key').read_text().strip()
    known = bytes.fromhex(text)
    md5, sha1, sha256 = (getattr(hashlib, name) for name in ('md5', 'sha1', 'sha256'))
    for secret in (
            hashlib.sha384(known).digest(), hashlib.sha3_512(text.encode()).digest(),
            sha256(sha256(known).digest()).digest(), md5(known).digest() + md5(known).digest(),
            sha1(known).digest() + md5(known).digest(), sha256(sha256(known).hexdigest().encode())
            .digest(), bytes(255 - b for b in known), bytes.fromhex(text[1:] + text[:1]),
            known[16:] + known[:16], bytes(b % 16 * 16 + b // 16 for b in known),
            (int.from_bytes(known) + 1).to_bytes(32), known[:-1] + b'\x07',
            SECRET + bytes(12) + known[12:]):
        assert is_public(secret)
    assert not any(is_public(sha256(bytes([i])).digest()) for i in range(200))


def test_the_public_secret_is_known_in_every_spelling_and_one_that_others_read_is_named(
        tmp_path, capsys):
    write_faces(tmp_path / 'faces')
    (tmp_path / 'faces' / 'toy.bin').touch()                   # does not make them drawn faces
    public = (config.CONFIGS / 'toy.key').read_bytes().strip()
    known = bytes.fromhex(public.decode())
    for text in (public.upper(), b'\xef\xbb\xbf' + public, public + b'\n\n', public[::-1],
                 known[::-1].hex().encode(), hashlib.sha256(known).hexdigest().encode(),
                 hashlib.sha256(public).hexdigest().encode(), public + b'00ff' * 4):
        (tmp_path / 'my.key').write_bytes(text)
        with pytest.raises(InputError, match='known to everybody'):
            release_secret(make_config(tmp_path, f'reconstruct.key={tmp_path}/my.key'))
    cfg = make_config(tmp_path)
    assert len(release_secret(cfg)) == 32
    path = tmp_path / 'run' / 'release.key'
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and not capsys.readouterr().out
    path.chmod(0o644)
    release_secret(cfg)
    assert 'others can read' in capsys.readouterr().out
    shutil.rmtree(tmp_path / 'faces')
    toy.draw_set(tmp_path / 'faces', 2, 2, 2, 10, size=16, seed=0)
    assert len(release_secret(make_config(tmp_path, f'reconstruct.key={tmp_path}/my.key')))


def test_release_order_is_secret_and_complete(tmp_path):
    write_faces(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'data.release_folds=[]', 'toy.identities=0')
    folds = split(cfg)
    source = folds[0].public.labels
    plan = plan_release(folds, b'secret', cfg)
    assert sorted(plan.image) == list(range(24)) and (np.diff(plan.label) >= 0).all()
    # One new label a person
    assert len({(a, b) for a, b in zip(source[plan.image], plan.label)}) == plan.people == 8
    assert (source[plan.image] != np.sort(source)).any()
    assert all(i in folds[k].released for k, i in zip(plan.fold, plan.image))
    other = plan_release(folds, b'another', cfg)
    assert (other.image != plan.image).any()
    cfg.reconstruct.images_per_person = 2
    assert count_release(folds, cfg).images == 2 * plan.people
    capped = plan_release(folds, b'secret', cfg)
    assert np.bincount(capped.label).tolist() == [2] * 8


def test_releases_share_no_mask_order_or_label_and_one_seed_tells_no_other(tmp_path):
    write_faces(tmp_path / 'faces', people=30, each=4)
    plans = []
    for words in ((), ('run.seed=1',), ('reconstruct.method=mask',), ('run.row=a',
                  'compare={a: []}'), ('reconstruct.method=mask', 'mae.mask_ratio=0.5')):
        cfg = make_config(tmp_path, 'data.release_folds=[]', *words)
        plans.append(plan_release(split(cfg), b'secret', cfg))
    seeds = torch.cat([plan.seeds for plan in plans])
    assert len(seeds.unique()) == len(seeds) == 5 * 120
    for a, b in zip(plans, plans[1:]):
        assert (a.image != b.image).mean() > 0.9
    # Bits of the seeds of neighbours are as often equal as not (five standard errors)
    bits = (seeds[:, None] >> torch.arange(64) & 1).float()
    assert abs((bits[1:] == bits[:-1]).float().mean() - 0.5) < 2.5 / (600 * 64) ** 0.5


# ---------------------------------------------------------------------------- the release

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
    hidden = protect.drawn(protect.hidden_patches(seeds, 0.75, cfg), 8) > 0
    hidden = hidden.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
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


def test_people_who_were_renamed_are_no_longer_matched_with_their_release(tmp_path):
    """The plan follows from names: with others all attackers would look in the wrong place."""
    folder_of_people(tmp_path / 'faces')
    write_faces(tmp_path / 'public', people=30, start=100)
    words = ('reconstruct.py', 'data.root=faces', 'data.public=public',
             'reconstruct.method=pixelate')
    run(tmp_path, *words)
    (tmp_path / 'faces' / 'id_000').rename(tmp_path / 'faces' / 'id_000b')
    assert 'made with another set of names' in run(tmp_path, *words, code=2)
    (tmp_path / 'faces' / 'id_000b').rename(tmp_path / 'faces' / 'id_000')
    assert 'nothing to do' in run(tmp_path, *words)


def test_nets_that_learnt_from_who_is_private_now_are_refused(finished):
    """After a change of the split, stages 2 to 4 alone used to go on with the old nets."""
    folder = finished[0]
    cfg = config.namespace(config.resolve(TINY, [
        f'run.folder={folder}/run', f'data.root={folder}/faces']))
    device = torch.device('cpu')

    def load():
        variant, folds = config.variants(cfg, compare=False)[0], split(cfg)
        yield lambda: protect.load_maes(variant, folds, device)
        yield lambda: train_mae.load_teacher(cfg, folds[0], device)
        yield lambda: Owned(cfg, 0, folds[0], device, {}).embedder('judge')

    assert all(net() for net in load())
    cfg.data.split_seed = 5
    for net in load():
        with pytest.raises(InputError, match='learnt from other images.* run `python .*train'):
            net()


def test_neither_who_asked_to_be_left_out_nor_the_key_is_named_in_a_checkpoint(copied):
    run(copied, 'train_mae.py', 'irm.weight=0', 'mae.name=few', 'data.exclude=[3, 14]')
    saved = torch.load(copied / 'run' / 'fold0' / 'few.pt', weights_only=True)
    assert saved['config']['data']['exclude'] == 2
    assert 'key' not in saved['config']['reconstruct']


@pytest.fixture
def masked(tmp_path):
    """A masked release in tmp_path/out, and its PlannedRelease."""
    write_faces(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'reconstruct.method=mask', 'data.release_folds=[]')
    folds = split(cfg)
    plan, private = plan_release(folds, SECRET, cfg), folds[0].private
    protections = [Protection(cfg, None)] * len(folds)
    released = protections[0].of_rows(private.select(plan.image), plan.seeds, CPU)
    encoded = [images.encode(torch.from_numpy(x).permute(2, 0, 1), 'png') for x in released]
    records.write_records(tmp_path / 'out', encoded, plan.label, 32)
    (tmp_path / 'out' / 'manifest.json').write_text(contents.manifest_text(FACTS))
    (tmp_path / 'out' / 'README.md').write_text(card(FACTS))
    return tmp_path / 'out', PlannedRelease(config.variants(cfg, compare=False)[0], private,
                                            protections, SECRET, plan, {}, CPU)


def card(facts):
    """README.md of a release in these tests."""
    return f'# Made by {facts["method"]}\n'


@pytest.mark.parametrize('name, content, words', [
    ('id_000.txt', b'', r"holds \['id_000.txt'\], which is no part of a release"),
    *(('manifest.json', text.encode(), 'another manifest') for text in (
        contents.manifest_text(FACTS | {'source': 'faces'}),
        contents.manifest_text(FACTS | {'made_by': 'FaceMAE kit Ann was here'}),
        contents.manifest_text(FACTS) + '  ', '{"method": "mask", ' + json.dumps(FACTS)[1:])),
    ('README.md', b'# Of ann', 'another README.md'), ('README.md', b'\xff', 'another README.md'),
    ('README.md', b'# Made by mask\r\n', 'another README.md'),
    ('property', SECRET.hex().encode(), 'holds the secret'),
    ('property', key_of(SECRET), 'holds the secret')])
def test_a_release_with_other_files_than_it_may_hold_is_refused(masked, name, content, words):
    folder, planned = masked
    planned.check_files(folder, FACTS, card)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        planned.check_files(folder, FACTS, card)


def test_a_release_with_other_labels_or_images_than_its_plan_is_refused(masked):
    folder, planned = masked
    planned.check_images(folder)
    found = [bytes(image) for image in records.Records(folder)]
    records.write_records(folder, [*found[1:], found[0]], planned.plan.label, 32)
    with pytest.raises(InputError, match='another image at'):
        planned.check_images(folder, all_images=True)
    records.write_records(folder, found, np.arange(len(found)), 32)
    with pytest.raises(InputError, match='other labels'):
        planned.check_images(folder)


def test_a_link_in_place_of_a_release_or_of_its_file_is_refused(masked):
    folder, planned = masked
    moved = folder.rename(folder.with_name('moved'))
    folder.symlink_to(moved)
    with pytest.raises(InputError, match='out is a link: .* delete it, make it again'):
        planned.check_files(folder, FACTS, card)
    folder.unlink()
    shutil.copytree(moved, folder)
    (folder / 'train.rec').unlink()
    (folder / 'train.rec').symlink_to(moved / 'train.rec')
    with pytest.raises(InputError, match='train.rec is no plain file'):
        planned.check_files(folder, FACTS, card)


def low_bits_changed(file):
    """An image file whose pixels differ by less than can be seen."""
    pixels = images.decode(file, 'an image')
    return images.encode(pixels ^ 1, 'png')


@pytest.mark.parametrize('change', ['more in train.rec', 'blanks', 'text', 'low bits'])
def test_a_full_check_compares_whole_files(masked, change):
    folder, planned = masked
    variant, labels = planned.variant, planned.plan.label
    folder = folder.rename(variant.release)
    encoded = [bytes(image) for image in records.Records(folder)]

    def check():
        return contents.check_records(variant, labels, iter(encoded), CPU)

    made_with = contents.made_with(variant.cfg, CPU)
    files.write_json(variant.folder / 'release.json', {'made_with': made_with})
    assert check() == 'finished and sound'
    of_image = {'text': lambda file: file[:33] + TEXT + file[33:], 'low bits': low_bits_changed}
    if change in of_image:
        records.write_records(folder, [of_image[change](encoded[0]), *encoded[1:]], labels, 32)
        words = 'stores 1 images in other bytes'
    else:
        name = {'more in train.rec': 'train.rec', 'blanks': 'property'}[change]
        (folder / name).write_bytes((folder / name).read_bytes() + b'  ')
        words = 'holds more than its images and labels'
    planned.check_images(folder, all_images=True)
    with pytest.raises(InputError, match=words):
        check()
    # Another Pillow stores the same image in other bytes, but changes nothing around it
    files.write_json(variant.folder / 'release.json', {'made_with': 'Pillow 1.0'})
    if change in of_image:
        assert 'could hide something' in check()
    else:
        with pytest.raises(InputError, match=words):
            check()
    assert not folder.with_name('reconstructed.tmp').exists()


def test_a_method_that_reads_hidden_pixels_is_not_released(masked, monkeypatch):
    folder, planned = masked
    planned.check_images(folder)
    monkeypatch.setitem(protect.PROTECTIONS, 'mask', protect.Method(
        lambda x, *rest: protect.masked(x, *rest) + x.roll(1, 3) / 200, 'mask_ratio',
        draws_mask=True))
    with pytest.raises(InputError, match='hidden pixels'):
        planned.check_images(folder)


def test_the_data_cards_say_what_the_key_protects_and_which_release_is_photos(finished):
    folder, printed = finished
    card, photos = (' '.join((folder / row / 'reconstructed' / 'README.md').read_text().split())
                    for row in ('run', 'run/originals'))
    for words in ('not anonymous', 'Two releases of the same photos', 'cannot be called back',
                  'can be read off'):
        assert words in card
    assert 'Never publish' in photos
    assert 'originals/reconstructed will hold the photos themselves' in ' '.join(printed.split())
