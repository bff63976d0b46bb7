"""Who is out stays out: look-alike names, what a run folder remembers, folders inside one another;
releases whose files or strength are not what they should be; partners by name."""
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_data import make_config
from test_people import folder_of_people, released_people

from conftest import ROOT, TINY, run
from facekit import check
from facekit.base import launch, process
from facekit.base.config import namespace, resolve
from facekit.base.errors import InputError
from facekit.data import faces, images
from facekit.data.names import MEMORY, look_of, remembered
from facekit.data.people import count_release, split
from facekit.data.records import write_records
from facekit.privacy import protect
from facekit.privacy.partners import check_alike, key_of_name, partners
from facekit.privacy.release import key_file, read_secret


@pytest.mark.parametrize('a, b', [
    (unicodedata.normalize('NFC', 'José'), unicodedata.normalize('NFD', 'José')),
    ('ID_005', 'id_005'), ('Ann  Lee', 'ann lee'), ('Ａｎｎ', 'Ann'), ('an\u200bn', 'ann'),
    ('Аnn', 'Ann'), ('İbrahim', 'ibrahim'), ('O’Neil', "O'Neil"),
    ('ann\u2013lee', 'ann-lee'), ('Straße', 'STRASSE'), ('ﬁona', 'fiona'),
    ('Εva', 'Eva'), ('ΒΕΖΗΜΝΥ', 'BEZHMNY'), ('Νina', 'Nina'), ('νίκος', 'Νίκος'), ('Eνa', 'Eva'),
    ('zoё', 'Zoë'), ('ɑɡօ', 'ago'), ('ann⁃lee', 'ann―lee'),
    *((f"O{mark}Brien", "O'Brien") for mark in '‘´′`'),
    *((f'Ann{mark}', 'Ann') for mark in '\ufe0f\U000e0100\u034f\u180b\u3164\uffa0\u2800')])
def test_names_that_look_alike_are_one(a, b):
    assert a != b and look_of(a) == look_of(b)


@pytest.mark.parametrize('a, b', [
    ('José', 'Jose'), ('Żaneta', 'Zaneta'), ('id_005', 'id_05'), ('a_b', 'a b'), ('Lia', 'Ila')])
def test_other_names_are_others(a, b):
    assert look_of(a) != look_of(b)


def test_two_folders_that_look_alike_are_refused(tmp_path):
    root = folder_of_people(tmp_path / 'faces')
    shutil.copytree(root / 'id_003', root / 'ID_003')
    with pytest.raises(InputError, match="'ID_003' and 'id_003', which look alike"):
        split(make_config(tmp_path))


def test_an_exclusion_by_another_spelling_excludes(tmp_path):
    folder_of_people(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'data.exclude=[ID_005]', 'data.release_folds=[]')
    assert 'id_005' not in released_people(cfg) and len(released_people(cfg)) == 11


@pytest.mark.parametrize('form', ['[{}]', '["{}"]', "['{}']"])
def test_a_name_that_is_no_utf_8_excludes(tmp_path, form):
    root, name = folder_of_people(tmp_path / 'faces'), os.fsdecode(b'Jos\xe9')
    (root / 'id_005').rename(root / name)
    cfg = make_config(tmp_path, f'data.exclude={form.format(name)}', 'data.release_folds=[]')
    assert name not in released_people(cfg) and len(released_people(cfg)) == 11


def test_a_run_folder_remembers_who_was_excluded_without_the_name(tmp_path):
    folder_of_people(tmp_path / 'faces')
    split(make_config(tmp_path, 'data.exclude=[id_005]', 'data.release_folds=[]'))
    for later in ([], ['data.exclude=[id_007]'], []):
        cfg = make_config(tmp_path, 'data.release_folds=[]', *later)
        assert 'id_005' not in released_people(cfg)
    assert 'id_007' not in released_people(cfg)
    assert count_release(split(cfg), cfg).excluded_people == 2
    memory = tmp_path / 'run' / MEMORY
    assert memory.stat().st_mode & 0o777 == 0o600 and 'id_00' not in memory.read_text()
    assert len(json.loads(memory.read_text())['people']) == 2


@pytest.mark.parametrize('damage', [
    {'salt': '00' * 65}, {'salt': ''}, {'salt': 3}, {'people': [3]}, {'people': [None]},
    {'people': {}}, {'people': 'abc'}, {'people': ['abc']}, {'people': []}])
def test_a_damaged_memory_of_who_was_excluded_is_not_taken_for_an_empty_one(tmp_path, damage):
    memory = tmp_path / 'run' / MEMORY
    memory.parent.mkdir()
    memory.write_text(json.dumps({'salt': '00' * 32, 'people': ['0' * 128]}))
    assert remembered(tmp_path / 'run')
    memory.write_text(json.dumps(json.loads(memory.read_text()) | damage))
    with pytest.raises(InputError, match='remembers who was excluded, is damaged'):
        remembered(tmp_path / 'run')


def saved(picture, path, change=lambda image: image, **how):
    """Save a picture file once more, changed."""
    change(Image.open(picture).convert('RGB')).save(path, **how)


@pytest.mark.parametrize('copy', [
    lambda old, new: new.with_suffix('.png').write_bytes(old.read_bytes() + b'more'),
    lambda old, new: saved(old, new.with_suffix('.jpg'), quality=60),
    lambda old, new: saved(old, new.with_suffix('.webp'), quality=80),
    lambda old, new: saved(old, new.with_suffix('.bmp'), ImageOps.mirror),
    lambda old, new: saved(old, new.with_suffix('.png'), lambda x: x.rotate(90)),
    lambda old, new: saved(old, new.with_suffix('.jpg'), ImageOps.grayscale),
    lambda old, new: saved(old, new.with_suffix('.png'), lambda x: x.resize((70, 70))),
    lambda old, new: saved(old, new.with_suffix('.png'), lambda x: x.point(lambda v: 0.8 * v)),
    lambda old, new: saved(old, new.with_suffix('.png'), lambda x: ImageOps.expand(x, (9, 0)))],
    ids='longer jpeg webp mirrored turned grey larger darker margins'.split())
def test_copies_of_an_excluded_person_under_another_name_stay_out(tmp_path, copy):
    root = folder_of_people(tmp_path / 'faces')
    copy(root / 'id_005' / '1.png', root / 'id_007' / 'new')
    words = 'data.exclude=[id_005]', 'data.release_folds=[]', 'data.on_size=resize'
    cfg = make_config(tmp_path, *words)
    counts = count_release(split(cfg), cfg)
    assert (counts.excluded_copies, counts.images, counts.people) == (1, 33, 11)
    assert '1 image of others, the same picture as one of theirs, or nearly' in counts.sentence([])


@pytest.mark.parametrize('run_folder', ['faces/run', '.', 'faces'])
def test_a_run_folder_and_photos_do_not_contain_one_another(tmp_path, run_folder):
    folder_of_people(tmp_path / 'faces')
    before = sorted(tmp_path.rglob('*'))
    cfg = make_config(tmp_path, f'run.folder={tmp_path / run_folder}')
    with pytest.raises(InputError, match='contain one another'):
        split(cfg)
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('settings', [
    'reconstruct.method=noise reconstruct.noise_std=0',
    'reconstruct.method=pixelate reconstruct.pixelate_block=1',
    'reconstruct.method=blur reconstruct.blur_sigma=0.1',
    'reconstruct.method=mask reconstruct.mask_ratio=0.05'])
def test_a_strength_that_protects_nothing_is_refused_before_anything_is_written(
        copied, settings):
    for command in (['reconstruct.py'], ['evaluate.py', '--check']):
        said = run(copied, *command, *settings.split(), 'run.folder=other', code=2)
        assert 'protects nothing' in said
    assert not any((copied / 'other' / name).exists() for name in (
        'reconstructed', 'reconstructed.tmp', 'release.json'))


@pytest.mark.parametrize('file, change', [
    ('train.rec', lambda content: content + b'more'),
    ('README.md', lambda content: content.replace(b'people', b'person')),
    ('property', lambda content: b'somebody')])
def test_a_release_that_was_changed_is_told_by_its_digest(finished, tmp_path, file, change):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'run' / 'reconstructed' / file
    path.write_bytes(change(path.read_bytes()))
    said = run(tmp_path, 'reconstruct.py', code=2)
    assert 'other files than when it was published' in said


def test_a_release_names_the_commit_and_no_tag_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, 'CONFIGS', tmp_path / 'configs')
    monkeypatch.delenv('GIT_DIR', raising=False)
    (tmp_path / 'configs').mkdir()
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    git(['git', 'init'])
    assert launch.commit().startswith('version')                  # there is no commit yet
    who = ['-c', 'user.name=x', '-c', 'user.email=x@example.org']
    git(['git', *who, 'commit', '--allow-empty', '-m', 'x'])
    git(['git', *who, 'tag', '-a', 'paper/v1-of-ann', '-m', 'x'])
    assert re.fullmatch('[0-9a-f]{12}', launch.commit())


def people_in(folder, names, files='{}.png', each=3):
    """Folders of people with some photos each, drawn by lot from the person's and photo's place,
    so that equal places have equal photos."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            rng = np.random.default_rng([number, i])
            image = torch.from_numpy(rng.integers(0, 256, (3, 4, 4), np.uint8))
            image = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
            (folder / name / files.format(i + 1)).write_bytes(images.encode(image, 'png'))


def two_sets(tmp_path):
    """The FaceSets `theirs` and `faces`."""
    cfg = make_config(tmp_path)
    return faces.load(tmp_path / 'theirs', cfg), faces.load(tmp_path / 'faces', cfg)


def test_partners_are_matched_by_name_however_they_sort(tmp_path):
    names = [f'p{number}' for number in range(1, 13)]                  # p1, p10, p11, p12, p2, ...
    people_in(tmp_path / 'faces', names)
    people_in(tmp_path / 'theirs', [f'p{number:02}' for number in range(1, 13)], '00{}.png')
    theirs, own = two_sets(tmp_path)
    found = partners(theirs, own)
    assert np.array_equal(theirs.select(found).pixels(), own.select(np.arange(36)).pixels())
    check_alike(theirs.select(found), own, 'cpu')


def test_partners_that_are_none_are_refused(tmp_path):
    people_in(tmp_path / 'faces', [f'p{number:02}' for number in range(12)])
    people_in(tmp_path / 'theirs', [f'p{number:02}' for number in reversed(range(12))])
    theirs, own = two_sets(tmp_path)
    with pytest.raises(InputError, match='no more alike'):
        check_alike(theirs.select(partners(theirs, own)), own, 'cpu')
    for number, name in enumerate(sorted((tmp_path / 'theirs').iterdir())):
        if number % 2:                                # a half of the people in their right places
            shutil.rmtree(name)
            shutil.copytree(tmp_path / 'faces' / name.name, name)
    theirs, own = two_sets(tmp_path)
    with pytest.raises(InputError, match='no more alike'):
        check_alike(theirs.select(partners(theirs, own)), own, 'cpu')
    shutil.rmtree(tmp_path / 'theirs' / 'p03')
    with pytest.raises(InputError, match='do not have the same people'):
        partners(*two_sets(tmp_path))


def test_records_are_matched_with_files_in_the_order_of_their_numbers(tmp_path):
    """1.jpg, 10.jpg, 11.jpg, 2.jpg as text: in a wrong order a release looks private."""
    people_in(tmp_path / 'faces', ['0', '1'], each=12)
    ordered = [(tmp_path / 'faces' / name / f'{i}.png').read_bytes()
               for name in '01' for i in range(1, 13)]
    write_records(tmp_path / 'theirs', ordered, [0] * 12 + [1] * 12, 32)
    theirs, own = two_sets(tmp_path)
    found = partners(theirs, own)
    assert np.array_equal(theirs.select(found).pixels(), own.select(np.arange(24)).pixels())
    check_alike(theirs.select(found), own, 'cpu')
    within = np.r_[np.roll(found[:12], 1), np.roll(found[12:], 1)]
    with pytest.raises(InputError, match='no more alike'):
        check_alike(theirs.select(within), own, 'cpu')


@pytest.mark.parametrize('a, b', [
    ('p01', 'p1'), ('p000', 'p0'), ('9' * 5000, '0' + '9' * 5000)])
def test_numbers_in_names_are_matched_as_numbers(a, b):
    assert key_of_name(a) == key_of_name(b) != key_of_name('7')


@pytest.mark.parametrize('words', ['"reconstruct.remove=[id_002]"',
                                   '"reconstruct={remove: [id_002]}"', 'reconstruct.export=x'])
def test_no_row_takes_people_out_by_itself(words):
    with pytest.raises(InputError, match='which all rows share'):
        resolve(TINY, [f'compare={{a: [{words}]}}'])


def test_small_pictures_and_names_in_a_run_folder_are_the_users_alone(copied):
    run(copied, 'reconstruct.py', 'data.exclude=[3]', 'reconstruct.method=mask', 'run.folder=new')
    looks = list((copied / 'new' / 'looks').glob('*.npz'))
    assert {path.stat().st_mode & 0o777 for path in looks} == {0o600}
    assert (copied / 'new' / 'looks').stat().st_mode & 0o777 == 0o700
    saved = json.loads((copied / 'new' / 'release.json').read_text())
    assert saved['config']['data']['exclude'] == 1


@pytest.mark.parametrize('words', [
    'mae.epochs=3', 'mae.name=short', 'reconstruct.mask_ratio=0.5', 'fr.epochs=3'])
def test_settings_of_finished_files_are_compared_before_anything_is_trained(finished, words):
    said = run(finished[0], 'evaluate.py', '--check', words, code=2)
    assert 'a row of their own' in said
    row = f'compare={{other: [{words}, mae.name=other]}}'
    run(finished[0], 'evaluate.py', '--check', '--compare', row)


def test_a_strength_without_a_key_and_an_import_that_fails_are_told_at_the_check(monkeypatch):
    cfg = namespace(resolve(TINY, ['reconstruct.method=blur', 'toy.root=nowhere',
                                   'data.root=nowhere']))
    check.check_experiment(cfg, compare=False)
    monkeypatch.setitem(sys.modules, 'torchvision.transforms.v2.functional', None)
    with pytest.raises(InputError, match='install torch and torchvision together'):
        check.check_experiment(cfg, compare=False)
    monkeypatch.setitem(protect.PROTECTIONS, 'blur', protect.Method(protect.masked, 'darkness'))
    with pytest.raises(InputError, match='no key reconstruct.darkness: add it there'):
        check.check_experiment(cfg, compare=False)


def test_few_steps_are_told_with_words_that_mend_them(finished):
    command = 'evaluate.py', '--check', 'run.folder=new', 'data.root=faces', 'toy.root='
    words = re.findall('few for faces: try (.*)', run(finished[0], *command))
    assert words == ['mae.epochs=267 irm.warmup_epochs=67', 'fr.epochs=267']
    assert 'few for faces' not in run(finished[0], *command, *' '.join(words).split())


def test_a_key_of_the_kit_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = namespace(resolve(ROOT / 'configs' / 'toy.yaml', []))
    assert read_secret(key_file(cfg)) == bytes.fromhex((ROOT / 'configs/toy.key').read_text())


def test_a_task_of_srun_alone_is_told_about_torchrun(monkeypatch):
    monkeypatch.setenv('SLURM_PROCID', '1')
    with pytest.raises(InputError, match='start torchrun by it'):
        process.start_processes(namespace(resolve(TINY)))
