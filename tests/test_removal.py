"""One command takes a person out, and leaves nothing of them; pictures are for the user alone."""
import json
import shutil

import numpy as np
import pytest
from test_data import make_config

from conftest import run
from facekit.data import records
from facekit.data.people import split
from facekit.privacy.removal import OF_A_ROW, OF_THE_RUN

ROWS = 'run', 'run/mask', 'run/originals'


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished experiment."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def people_of(folder):
    """Released people, and the others, by name; and the released images' number."""
    fold = split(make_config(folder))[0]
    released = np.unique(fold.private.labels[fold.released])
    others = np.setdiff1d(np.arange(len(fold.private.people)), released)
    return [fold.private.people[some].tolist() for some in (released, others)]


def test_a_released_person_is_taken_out_with_all_that_was_made_of_them(folder):
    released, _ = people_of(folder)
    name, key = released[0], (folder / 'run' / 'release.key').read_bytes()
    before = len(records.Records(folder / 'run' / 'originals' / 'reconstructed').labels)
    assert 'nobody in' in run(folder, 'reconstruct.py', 'reconstruct.remove=[nobody]', code=2)
    assert (folder / 'run' / 'results.json').exists()
    said = run(folder, 'reconstruct.py', f'reconstruct.remove=[{name}]')
    for place in ('run/results.json', 'run/mask/fr.pt', 'run/report.html', 'run/figures'):
        assert f'deletes {place}' in said
    assert (folder / 'run' / 'release.key').read_bytes() == key
    for row in ROWS:
        assert len(records.Records(folder / row / 'reconstructed').labels) == before - 6
        manifest = json.loads((folder / row / 'reconstructed' / 'manifest.json').read_text())
        assert manifest['excluded_people'] == 1
        left = {path.name for path in (folder / row).iterdir()} & set(OF_A_ROW)
        assert left == {'reconstructed', 'release.json'}
    left = {path for path in OF_THE_RUN if (folder / 'run' / path).exists()}
    assert left <= {'figures', 'log/reconstruct', 'log/reconstruct.jsonl'}      # made anew
    # Nobody comes back with a later command, which knows of no exclusion
    assert 'nothing to do' in run(folder, 'reconstruct.py')
    assert people_of(folder)[0] == released[1:]
    # The others' masks and order stay
    assert (folder / 'run' / 'fold0' / 'mae.pt').exists()


def test_nets_that_learnt_from_who_is_taken_out_go_too(folder):
    _, public = people_of(folder)
    said = run(folder, 'reconstruct.py', f'reconstruct.remove=[{public[0]}]')
    for name in ('mae', 'teacher', 'judge'):
        assert f'deletes run/fold0/{name}.pt' in said
        assert not (folder / 'run' / 'fold0' / f'{name}.pt').exists()
    assert 'trained again' in said and not (folder / 'run' / 'reconstructed').exists()


def test_two_processes_take_a_person_out_and_nothing_of_others_models_stays(folder):
    for name in ('external.json', 'external_measured.json', 'external_scores/attack_judge.csv'):
        (folder / 'run' / name).parent.mkdir(exist_ok=True)
        (folder / 'run' / name).write_text('{}')
    name, *others = people_of(folder)[0]
    words = 'reconstruct.py', f'reconstruct.remove=[{name}]'
    run(folder, *words, processes=2)
    assert not list((folder / 'run').glob('external*')) and people_of(folder)[0] == others
    made = {row: (folder / row / 'reconstructed' / 'train.rec').read_bytes() for row in ROWS}
    run(folder, *words)                         # as after an interruption: the same once more
    assert {row: (folder / row / 'reconstructed' / 'train.rec').read_bytes()
            for row in ROWS} == made


def test_pictures_of_originals_are_for_the_user_alone(finished):
    for name in ('figures', 'originals/reconstructed'):
        assert (finished[0] / 'run' / name).stat().st_mode & 0o777 == 0o700
    assert (finished[0] / 'run' / 'reconstructed').stat().st_mode & 0o777 != 0o700
