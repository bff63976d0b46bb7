"""One command takes a person out, and leaves nothing of them; pictures are for the user alone."""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_data import make_config
from test_people import folder_of_people

from conftest import run
from facekit.data import records
from facekit.data.people import split
from facekit.privacy.removal import OF_A_ROW, OF_THE_RUN

ROWS = 'run', 'run/mask', 'run/originals'


def people_of(folder):
    """Released people, and the others, by name."""
    fold = split(make_config(folder))[0]
    released = np.unique(fold.private.labels[fold.released])
    others = np.setdiff1d(np.arange(len(fold.private.people)), released)
    return [fold.private.people[some].tolist() for some in (released, others)]


def test_a_released_person_is_taken_out_with_all_that_was_made_of_them(whole):
    released, _ = people_of(whole)
    name, key = released[0], (whole / 'run' / 'release.key').read_bytes()
    before = len(records.Records(whole / 'run' / 'originals' / 'reconstructed').labels)
    assert 'nobody in' in run(whole, 'reconstruct.py', 'reconstruct.remove=[nobody]', code=2)
    assert (whole / 'run' / 'results.json').exists()
    said = run(whole, 'reconstruct.py', f'reconstruct.remove=[{name}]')
    for place in ('run/results.json', 'run/mask/fr.pt', 'run/report.html', 'run/figures'):
        assert f'deletes {place}' in said
    assert (whole / 'run' / 'release.key').read_bytes() == key
    for row in ROWS:
        assert len(records.Records(whole / row / 'reconstructed').labels) == before - 6
        manifest = json.loads((whole / row / 'reconstructed' / 'manifest.json').read_text())
        assert manifest['excluded_people'] == 1
        left = {path.name for path in (whole / row).iterdir()} & set(OF_A_ROW)
        assert left == {'reconstructed', 'release.json'}
    left = {path for path in OF_THE_RUN if (whole / 'run' / path).exists()}
    assert left <= {'figures', 'log/reconstruct', 'log/reconstruct.jsonl'}      # made anew
    # Nobody comes back with a later command, which knows of no exclusion
    assert 'nothing to do' in run(whole, 'reconstruct.py')
    assert people_of(whole)[0] == released[1:]
    # Who learnt from others only stays
    assert (whole / 'run' / 'fold0' / 'mae.pt').exists()


def test_nets_that_learnt_from_who_is_taken_out_go_too(whole):
    _, public = people_of(whole)
    said = run(whole, 'reconstruct.py', f'reconstruct.remove=[{public[0]}]')
    for name in ('mae', 'teacher', 'judge'):
        assert f'deletes run/fold0/{name}.pt' in said
        assert not (whole / 'run' / 'fold0' / f'{name}.pt').exists()
    assert 'trained again' in said and not (whole / 'run' / 'reconstructed').exists()


def test_two_processes_take_a_person_out_and_nothing_of_others_models_stays(whole):
    for name in ('external.json', 'external_measured.json', 'external_scores/attack_judge.csv'):
        (whole / 'run' / name).parent.mkdir(exist_ok=True)
        (whole / 'run' / name).write_text('{}')
    name, *others = people_of(whole)[0]
    words = 'reconstruct.py', f'reconstruct.remove=[{name}]'
    run(whole, *words, processes=2)
    assert not list((whole / 'run').glob('external*')) and people_of(whole)[0] == others
    made = {row: (whole / row / 'reconstructed' / 'train.rec').read_bytes() for row in ROWS}
    run(whole, *words)                         # as after an interruption: the same once more
    assert {row: (whole / row / 'reconstructed' / 'train.rec').read_bytes()
            for row in ROWS} == made


def test_rows_that_the_config_does_not_name_lose_the_person_too(whole):
    name = people_of(whole)[0][0]
    said = run(whole, 'reconstruct.py', 'compare={}', f'reconstruct.remove=[{name}]')
    assert 'give the rows of run/mask, run/originals (compare) again' in said
    assert not (whole / 'run' / 'mask' / 'fr.pt').exists()
    assert not (whole / 'run' / 'originals' / 'reconstructed').exists()
    assert (whole / 'run' / 'reconstructed').exists()                     # made anew


def test_pictures_of_originals_are_for_the_user_alone(finished):
    for name in ('figures', 'originals/reconstructed'):
        assert (finished[0] / 'run' / name).stat().st_mode & 0o777 == 0o700
    assert (finished[0] / 'run' / 'reconstructed').stat().st_mode & 0o777 != 0o700


def test_what_is_told_at_the_end_of_a_removal_continues_this_run(whole):
    name = people_of(whole)[0][0]
    told = run(whole, 'reconstruct.py', f'reconstruct.remove=[{name}]', 'fr.augment=0')
    script, _, *words = shlex.split(re.search('then run `(.*?)`', told)[1])
    assert Path(script).is_file() and words == ['run.folder=run', 'fr.augment=0']
    assert 'releases 9 of 24' in run(whole, 'evaluate.py', '--check', *words)


@pytest.mark.parametrize('script, words, sentence, right', [
    ('reconstruct.py', ['reconstruct.export=new'], 'reconstruct.export: leave these out', []),
    ('reconstruct.py', ['run.folder=typo'], 'name the folder of one', ['run.folder=run']),
    ('train_fr.py', [], 'give it to reconstruct.py alone', []),
    ('evaluate.py', ['--check'], 'give it to reconstruct.py alone', [])])
def test_a_removal_that_would_do_nothing_is_refused(whole, script, words, sentence, right):
    name = people_of(whole)[0][0]
    before = {path: path.read_bytes() for path in whole.rglob('*') if path.is_file()}
    told = run(whole, script, *words, f'reconstruct.remove=[{name}]', code=2)
    assert sentence in told
    assert {path: path.read_bytes() for path in whole.rglob('*') if path.is_file()} == before
    assert f'out: {name}' in run(whole, 'reconstruct.py', *right, f'reconstruct.remove=[{name}]')


def test_nothing_of_the_person_stays_in_drafts_looks_links_or_other_folds(whole, tmp_path_factory):
    run_folder, disk = whole / 'run', tmp_path_factory.mktemp('disk') / 'mask'
    (run_folder / 'mask').rename(disk)
    (run_folder / 'mask').symlink_to(disk)
    (run_folder / 'embeddings.npz.tmp').write_bytes(b'x')
    (run_folder / 'external_scores').mkdir()
    run(whole, 'train_fr.py', 'stage=judge', 'data.release_folds=[1]')
    old = set((run_folder / 'looks').glob('reconstructed-*'))
    assert old and (run_folder / 'fold1' / 'judge.pt').exists()
    name = people_of(whole)[0][0]
    run(whole, 'reconstruct.py', 'compare={}', f'reconstruct.remove=[{name}]')
    assert not (disk / 'reconstructed').exists() and not (disk / 'fr.pt').exists()
    assert not (run_folder / 'embeddings.npz.tmp').exists()
    assert not (run_folder / 'external_scores').exists()
    assert not (run_folder / 'fold1' / 'judge.pt').exists()
    assert (run_folder / 'fold0' / 'judge.pt').exists()            # it never saw the person
    assert not old & set((run_folder / 'looks').glob('reconstructed-*'))


def test_who_is_excluded_and_whose_photos_are_gone_is_told(tmp_path, capsys):
    faces = folder_of_people(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'data.exclude=[id_003]')
    split(cfg)
    assert 'warning' not in capsys.readouterr().out
    (faces / 'id_003').rename(tmp_path / 'id_003')
    split(cfg)                                     # the name is remembered, and no error
    assert 'has no photos of 1 of those who are excluded' in capsys.readouterr().out
    (tmp_path / 'id_003').rename(faces / 'id_003')
    split(cfg)
    assert 'put the photos back' not in capsys.readouterr().out
