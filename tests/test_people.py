"""Nobody is released by mistake: names, exclusions, what is passed over, who attacks."""
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_config, write_faces

from facekit import check
from facekit.base.errors import InputError
from facekit.data import faces, images, records, toy
from facekit.data.people import count_release, split
from facekit.privacy.groups import foreign_groups, own_groups
from facekit.privacy.release import plan_release


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


def plan_and_names(cfg):
    """The plan of a config's release, and whose each of its images is, in their order."""
    folds = split(cfg)
    plan, private = plan_release(folds, b'secret', cfg), folds[0].private
    return plan, private.people[private.labels[plan.image]].tolist()


def test_adding_a_person_changes_nobody_elses_group_order_or_exclusion(tmp_path):
    """A new folder used to shift all labels: who was excluded was released, another left out."""
    root = folder_of_people(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'data.exclude=[id_005]', 'data.release_folds=[]')
    before, (plan, order) = released_people(cfg), plan_and_names(cfg)
    for name in ('.ipynb_checkpoints', 'aaa', 'zzz'):
        shutil.copytree(root / 'id_003', root / name)
        for file in (root / name).iterdir():                          # other pictures
            file.write_bytes(images.encode(torch.randint(0, 256, (3, 32, 32),
                                                         dtype=torch.uint8), 'png'))
    after = released_people(cfg)
    assert 'id_005' not in before | after and len(before) == 11
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {'aaa', 'zzz'}             # the hidden one is nobody
    later, names = plan_and_names(cfg)
    assert [name for name in names if name in before] == order
    assert set(plan.seeds.tolist()) <= set(later.seeds.tolist())


@pytest.mark.parametrize('exclude, words', [
    ('[id_05]', "'id_05'.* such as id_005"), ('[5]', "'5'.* such as id_000")])
def test_an_exclusion_that_matches_nobody_is_refused(tmp_path, exclude, words):
    folder_of_people(tmp_path / 'faces')
    with pytest.raises(InputError, match=words):
        split(make_config(tmp_path, f'data.exclude={exclude}'))


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


@pytest.mark.parametrize('make, path, words', [
    (lambda root: write_faces(root, people=1), '', 'of one person only.* its label'),
    (lambda root: folder_of_people(root / 'CASIA'), '', 'one sub-folder per person'),
    (write_faces, 'train.idx', 'train.idx is no .rec: .*train.rec'),
    (lambda root: None, '', 'does not exist: set data.root')])
def test_a_set_that_is_none_is_told_what_it_is(tmp_path, make, path, words):
    make(tmp_path / 'faces')
    with pytest.raises(InputError, match=words):
        faces.load(tmp_path / 'faces' / path, make_config(tmp_path))


def test_photos_that_are_not_square_lose_their_edges_and_a_warning_says_so(tmp_path, capsys):
    image = torch.zeros(3, 40, 32, dtype=torch.uint8)
    image[:, 4:36] = 200                                              # the middle, 32 x 32
    other = torch.zeros(3, 32, 32, dtype=torch.uint8)
    records.write_records(tmp_path / 'faces', [images.encode(image, 'png'),
                                               images.encode(other, 'png')], [0, 1], 32)
    found = faces.load(tmp_path / 'faces', make_config(tmp_path, 'data.on_size=resize'))
    assert (found.images[:1] == 200).all()
    assert '1 image of' in (said := capsys.readouterr().out) and 'not square' in said


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


def test_a_foreign_release_of_other_people_is_refused(tmp_path):
    """It would look private: each image would be searched for behind another one."""
    cfg = make_config(tmp_path, f'release={tmp_path}/theirs', f'originals={tmp_path}/faces')
    write_faces(tmp_path / 'faces', people=8, each=3)
    write_faces(tmp_path / 'theirs', people=12, each=2)
    with pytest.raises(InputError, match='do not have the same people'):
        foreign_groups(cfg, faces.load(tmp_path / 'theirs', cfg), 'cpu')


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
    check.check_people(cfg, [], check.undecoded(cfg.data.root, cfg))
    printed = capsys.readouterr().out
    assert re.search(r'other has 3 names of .*faces, too \(id_000\)', printed)
    assert 'attackers learn from 3 people' in printed
