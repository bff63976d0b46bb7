"""Nobody is released by mistake: names, exclusions, what is passed over, the secret, the check."""
import hashlib
import re
import shutil
import stat
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_config, write_faces

import train_mae
from conftest import TINY, run
from facekit import check
from facekit.base import config, launch
from facekit.base.errors import InputError
from facekit.data import batches, faces, images, records, toy
from facekit.data.people import count_release, split
from facekit.privacy import protect
from facekit.privacy.groups import Owned, foreign_groups, own_groups
from facekit.privacy.protect import FaceMAE, Protection
from facekit.privacy.release import PlannedRelease, plan_release, read_secret, release_secret


def folder_of_people(root, people=12, each=3):
    """A folder per person, named id_000 and so on."""
    for person in range(people):
        (root / f'id_{person:03}').mkdir(parents=True)
        drawn = toy.draw(np.full(each, person), np.arange(each), 32)
        for i, image in enumerate(drawn):
            (root / f'id_{person:03}' / f'{i}.png').write_bytes(images.encode(image, 'png'))
    return root


def released_people(cfg):
    """{name of a released person: number of the fold} of a config."""
    return {str(name): fold.k for fold in split(cfg)
            for name in fold.private.people[np.unique(fold.private.labels[fold.released])]}


def test_adding_a_person_changes_nobody_elses_group_order_or_exclusion(tmp_path):
    """A new folder used to shift all labels: who was excluded was released, another left out."""
    root = folder_of_people(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'data.exclude=[id_005]', 'data.release_folds=[]')
    before = released_people(cfg)
    folds = split(cfg)
    plan = plan_release(folds, b'secret', cfg)
    order = [str(folds[0].private.people[folds[0].private.labels[i]]) for i in plan.image]
    for name in ('.ipynb_checkpoints', 'aaa', 'zzz'):
        shutil.copytree(root / 'id_003', root / name)
        for file in (root / name).iterdir():                          # other pictures
            file.write_bytes(images.encode(torch.randint(0, 256, (3, 32, 32),
                                                         dtype=torch.uint8), 'png'))
    after = released_people(cfg)
    assert 'id_005' not in before | after and len(before) == 11
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {'aaa', 'zzz'}             # the hidden one is nobody
    folds = split(cfg)
    later = plan_release(folds, b'secret', cfg)
    names = [str(folds[0].private.people[folds[0].private.labels[i]]) for i in later.image]
    assert [name for name in names if name in before] == order
    seeds = dict(zip(zip(folds[0].private.hashes[later.image].tolist()), later.seeds.tolist()))
    assert set(plan.seeds.tolist()) <= set(seeds.values())


@pytest.mark.parametrize('exclude, words', [
    ('[id_05]', ["'id_05'", 'such as', 'id_005']), ('[5]', ["'5'", 'such as id_000']),
    ('[{a: 1}]', ['give text'])])
def test_an_exclusion_that_matches_nobody_is_refused(tmp_path, exclude, words):
    folder_of_people(tmp_path / 'faces')
    with pytest.raises(InputError) as error:
        split(make_config(tmp_path, f'data.exclude={exclude}'))
    assert all(word in str(error.value) for word in words), error.value


def test_an_unknown_label_is_refused_and_a_known_one_taken_out(tmp_path):
    write_faces(tmp_path / 'faces')
    with pytest.raises(InputError, match='999'):
        split(make_config(tmp_path, 'data.exclude=[999]'))
    cfg = make_config(tmp_path, 'data.exclude=[5]', 'data.release_folds=[]')
    assert '5' not in released_people(cfg)


def test_what_will_be_released_is_said_with_everybody_who_is_not(tmp_path):
    root = folder_of_people(tmp_path / 'faces')
    (root / 'id_001' / '2.png').unlink()
    cfg = make_config(tmp_path, 'data.exclude=[id_005]', 'data.min_images=3')
    folds = split(cfg)
    counts = count_release(folds, cfg)
    released = len(released_people(cfg))
    said = counts.sentence(cfg.data.exclude)
    assert said.startswith(f'releases {released} of 12 people, {3 * released} images; excluded: '
                           'id_005 (3 images); 1 with fewer than data.min_images')
    assert counts.people_in_other_folds == 10 - released


def test_what_a_folder_holds_beside_images_is_counted_and_named(tmp_path, capsys):
    root = folder_of_people(tmp_path / 'faces', people=3)
    for name, form in (('a.webp', 'WEBP'), ('a.bmp', 'BMP'), ('A.JPG', 'JPEG'),
                       ('a.jfif', 'JPEG'), ('a.jpeg', 'JPEG')):
        Image.open(root / 'id_000' / '0.png').save(root / 'id_001' / name, form)
    for name in ('x.heic', 'y.heic', 'notes.txt', '.DS_Store'):
        (root / 'id_002' / name).write_bytes(b'x')
    (root / '__MACOSX').mkdir()
    (root / 'list.txt').touch()
    (root / 'link').symlink_to(root / 'id_000')
    (root / 'id_001' / 'loop').symlink_to(root)
    (root / 'nobody').mkdir()
    found = faces.load(root, make_config(tmp_path))
    assert len(found) == 9 + 5 and found.people.tolist() == ['id_000', 'id_001', 'id_002']
    assert found.labels.tolist() == [0] * 3 + [1] * 8 + [2] * 3
    assert [path.name for path in found.source.files[3:11]] == [
        '0.png', '1.png', '2.png', 'A.JPG', 'a.bmp', 'a.jfif', 'a.jpeg', 'a.webp']
    said = capsys.readouterr().out
    for words in ('file that ends in .heic: 2 (id_002/x.heic, id_002/y.heic)',
                  'file that ends in .txt: 1', 'hidden: 2', 'no file: 1 (id_001/loop)',
                  'no folder of a person: 2 (link, list.txt)'):
        assert words in said, said


def make_single_person(root):
    files_ = [images.encode(x) for x in toy.draw(np.zeros(4, int), np.arange(4), 32)]
    records.write_records(root, files_, [0] * 4, 32)


def make_too_deep(root):
    folder_of_people(root / 'CASIA')


def make_other_record(root):
    write_faces(root)
    for ending in ('rec', 'idx'):
        (root / f'train.{ending}').rename(root / f'file.{ending}')


@pytest.mark.parametrize('make, path, words', [
    (make_single_person, '', ['one person', 'label']),
    (make_too_deep, '', ['one sub-folder per person']),
    (make_other_record, '', ['or a .rec file']),
    (write_faces, 'train.idx', ['train.idx is no .rec', 'train.rec']),
    (lambda root: (root.mkdir(), (root / 'faces.zip').write_bytes(b'PK')), 'faces.zip',
     ['faces.zip is no .rec']),
    (lambda root: (root.mkdir(), (root / '1.jpg').touch()), '', ['one sub-folder per person']),
    (lambda root: None, '', ['does not exist', 'data.root'])])
def test_a_set_that_is_none_is_told_what_it_is(tmp_path, make, path, words):
    make(tmp_path / 'faces')
    with pytest.raises(InputError) as error:
        faces.load(tmp_path / 'faces' / path, make_config(tmp_path))
    assert all(word in str(error.value) for word in words), error.value


def test_toy_faces_are_drawn_where_the_config_says_and_nowhere_else(tmp_path):
    with pytest.raises(InputError, match='does not exist'):
        faces.load(tmp_path / 'faces', make_config(tmp_path))
    assert not (tmp_path / 'faces').exists()
    cfg = make_config(tmp_path, f'toy.root={tmp_path}/faces')
    assert len(faces.load(tmp_path / 'faces', cfg)) == 144


def test_photos_that_are_not_square_lose_their_edges_and_a_warning_says_so(tmp_path, capsys):
    image = torch.zeros(3, 40, 32, dtype=torch.uint8)
    image[:, 4:36] = 200                                              # the middle, 32 x 32
    other = torch.zeros(3, 32, 32, dtype=torch.uint8)
    records.write_records(tmp_path / 'faces', [images.encode(image, 'png'),
                                               images.encode(other, 'png')], [0, 1], 32)
    found = faces.load(tmp_path / 'faces', make_config(tmp_path, 'data.on_size=resize'))
    assert (found.images[:1] == 200).all()
    assert '1 image of' in (said := capsys.readouterr().out) and 'not square' in said


# -------------------------------------------------------------------------------- the secret

@pytest.mark.parametrize('text', [
    b'', b'a', b'password', b'0' * 64, b'\0' * 64, b'ab' * 31, b'0123456789abcdef' * 4,
    bytes(range(32)).hex().encode(), bytes(range(0, 96, 3)).hex().encode(),
    2 * (config.CONFIGS / 'toy.key').read_bytes().strip()])
def test_a_secret_that_can_be_guessed_is_refused(tmp_path, text):
    (tmp_path / 'my.key').write_bytes(text)
    with pytest.raises(InputError, match='64 hex digits'):
        read_secret(tmp_path / 'my.key')


def test_a_secret_that_cannot_be_read_is_not_called_missing(tmp_path):
    """Who followed that would delete it, and with it all that matches releases and originals."""
    (tmp_path / 'my.key').mkdir()
    with pytest.raises(InputError, match='cannot be read') as error:
        read_secret(tmp_path / 'my.key')
    assert 'delete' not in str(error.value)


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


def test_who_asked_to_be_left_out_is_not_named_in_a_checkpoint(copied):
    run(copied, 'train_mae.py', 'irm.weight=0', 'mae.name=few', 'data.exclude=[3, 14]')
    saved = torch.load(copied / 'run' / 'fold0' / 'few.pt', weights_only=True)
    assert saved['config']['data']['exclude'] == 2


def test_a_method_that_reads_hidden_pixels_is_not_released(tmp_path, monkeypatch):
    write_faces(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'reconstruct.method=mask', 'data.release_folds=[]')
    folds = split(cfg)
    plan = plan_release(folds, b'secret', cfg)
    protections = [protect.Protection(cfg, None)] * len(folds)
    released = protections[0].of_rows(folds[0].private.select(plan.image), plan.seeds,
                                      torch.device('cpu'))
    encoded = [images.encode(torch.from_numpy(x).permute(2, 0, 1), 'png') for x in released]
    records.write_records(tmp_path / 'out', encoded, plan.label, 32)
    planned = PlannedRelease(config.variants(cfg, compare=False)[0], folds[0].private, protections,
                             b'secret', plan, {}, torch.device('cpu'))
    planned.check_images(tmp_path / 'out')
    monkeypatch.setitem(protect.PROTECTIONS, 'mask', protect.Method(
        lambda x, *rest: protect.masked(x, *rest) + x.roll(1, 3) / 200, 'mask_ratio',
        draws_mask=True))
    with pytest.raises(InputError, match='hidden pixels'):
        planned.check_images(tmp_path / 'out')


def test_a_kit_inside_another_repository_does_not_name_that(tmp_path, monkeypatch):
    monkeypatch.delenv('GIT_DIR', raising=False)
    for words in (['init', '-q'], ['-c', 'user.name=x', '-c', 'user.email=x', 'commit', '-q',
                                   '--allow-empty', '-m', 'secret']):
        subprocess.run(['git', *words], cwd=tmp_path, check=True)
    (tmp_path / 'kit' / 'configs').mkdir(parents=True)
    monkeypatch.setattr(launch, 'CONFIGS', tmp_path / 'kit' / 'configs')
    assert launch.commit() == 'version 2.0'
    monkeypatch.setattr(launch, 'CONFIGS', tmp_path / 'kit')           # the repository's own
    assert re.fullmatch('[0-9a-f]{12}', launch.commit())


def test_a_photo_that_is_too_large_is_told_the_limit():
    with pytest.raises(InputError, match='6000 x 4000 pixels, not 1 to 16777216: shrink'):
        images.decode(images.encode(torch.zeros(3, 4000, 6000, dtype=torch.uint8)), 'photo.jpg')


def test_the_data_cards_say_what_the_key_protects_and_which_release_is_photos(finished):
    folder, printed = finished
    card, photos = (' '.join((folder / row / 'reconstructed' / 'README.md').read_text().split())
                    for row in ('run', 'run/originals'))
    for words in ('not anonymous', 'Two releases of the same photos', 'cannot be called back',
                  'can be read off'):
        assert words in card
    assert 'Never publish' in photos
    assert 'originals/reconstructed will hold the photos themselves' in ' '.join(printed.split())


def test_attackers_learn_first_from_people_whom_no_recogniser_saw(tmp_path):
    root = folder_of_people(tmp_path / 'faces', people=40)
    for person in range(0, 40, 2):                     # half of them has one photo only
        for name in ('1.png', '2.png'):
            (root / f'id_{person:03}' / name).unlink()
    cfg = make_config(tmp_path, 'data.min_images=2', 'reconstruct.method=noise')
    folds = split(cfg)
    plan = plan_release(folds, b'secret', cfg)
    groups = own_groups(cfg, folds, [None] * len(folds), folds[0].private, plan, 'cpu')
    for group, fold in zip(groups, folds):
        known = group.pair_originals.rows
        seen = np.isin(known, fold.train)
        assert len(known) and 0 < (~seen).sum() == len(np.setdiff1d(fold.mae, fold.train))
        assert (np.diff(seen.astype(int)) >= 0).all()


def test_a_foreign_release_in_another_order_is_refused(tmp_path):
    """It would look private: each image would be searched for behind another one."""
    cfg = make_config(tmp_path, f'release={tmp_path}/theirs', f'originals={tmp_path}/faces')
    write_faces(tmp_path / 'faces', people=8, each=3)
    write_faces(tmp_path / 'theirs', people=8, each=3)
    assert foreign_groups(cfg, faces.load(tmp_path / 'theirs', cfg), 'cpu')
    write_faces(tmp_path / 'theirs', people=12, each=2)
    with pytest.raises(InputError, match='do not have the same people'):
        foreign_groups(cfg, faces.load(tmp_path / 'theirs', cfg), 'cpu')


def test_who_is_excluded_stays_excluded_whatever_is_typed(tmp_path):
    """A quick hand gives the key twice, forgets the list of the config or base, or writes 010."""
    folder_of_people(tmp_path / 'faces')
    (tmp_path / 'faces' / 'id_003').rename(tmp_path / 'faces' / '010')
    (tmp_path / 'base.yaml').write_text(f'base: {TINY}\ndata: {{root: {tmp_path}/faces, '
                                        'release_folds: [], exclude: [id_000]}\n')
    (tmp_path / 'my.yaml').write_text('base: base.yaml\ndata: {exclude: [id_001]}\n')
    cfg = config.namespace(config.resolve(tmp_path / 'my.yaml', [
        'data.exclude=[010, id_002]', 'data.exclude=[010]', 'data={exclude: []}']))
    assert released_people(cfg).keys() == {f'id_{i:03}' for i in range(4, 12)}
    cfg = config.namespace(config.resolve(tmp_path / 'my.yaml', ['data.exclude=[10]']))
    with pytest.raises(InputError, match="'10'.* such as 010"):
        split(cfg)


def test_a_picture_of_an_excluded_person_is_not_released_under_another_name(tmp_path):
    root = folder_of_people(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'data.exclude=[id_005]', 'data.release_folds=[]')
    shutil.copy(root / 'id_005' / '0.png', root / 'id_003' / 'copy.png')
    folds = split(cfg)
    copies = np.flatnonzero(folds[0].private.hashes == folds[0].private.hashes[
        folds[0].private.labels == 5][0])
    assert len(copies) == 2
    for fold in folds:
        for rows in (fold.released, fold.train, fold.mae):
            assert not np.isin(copies, rows).any()
    counts = count_release(folds, cfg)
    assert counts.excluded_copies == 1 and counts.images == 33
    assert '1 image of others' in counts.sentence(cfg.data.exclude)


def test_what_only_the_user_can_tell_of_the_people_is_said(tmp_path, capsys):
    folder_of_people(tmp_path / 'faces')
    folder_of_people(tmp_path / 'other', people=3)
    cfg = make_config(tmp_path, f'data.public={tmp_path}/other')
    check.check_people(cfg, [])
    printed = capsys.readouterr().out
    assert re.search(r'other has 3 names of .*faces, too \(id_000\)', printed)
    assert 'attackers learn from 3 people' in printed
