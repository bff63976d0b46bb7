"""What sentences advise, followed to the letter: each table has what is wrong, the sentence, and
what was done as it says, after which the same command ends well."""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import make_config
from test_people import folder_of_people

from conftest import run
from facekit.base.config import SPECS, resolve
from facekit.base.errors import InputError
from facekit.data.names import MEMORY
from facekit.data.people import split
from facekit.nets.weights import load_checkpoint
from facekit.privacy.release import release_secret


@pytest.mark.parametrize('script, wrong, sentence, advised', [
    ('train_mae.py', ['mae.lr=1e30', 'mae.name=hot'],
     r'became .* train another one, mae\.name=NAME, with a smaller mae\.lr', ['mae.name=NAME']),
    ('train_mae.py', ['irm.weight=3'],
     r"another irm\.weight .* train another one beside it, mae\.name=NAME",
     ['irm.weight=3', 'mae.name=NAME']),
    ('train_fr.py', ['fr.lr=1e30', 'run.save_minutes=0'],
     r'became .* delete \S+ and train it anew with a smaller fr\.lr', ['fr.lr=0.01']),
    ('train_fr.py', ['fr.epochs=1'],
     r'another fr\.epochs .* delete it and run the same command again', ['fr.epochs=1'])])
def test_advice_on_a_training_leads_to_its_end(finished, tmp_path, script, wrong, sentence,
                                               advised):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    student = tmp_path / 'run' / 'fr.pt'
    if 'fr.lr=1e30' in wrong:
        student.unlink()
    assert re.search(sentence, run(tmp_path, script, *wrong, code=2))
    if 'delete' in sentence:
        student.unlink(missing_ok=True)
    run(tmp_path, script, *advised)
    made = student if script == 'train_fr.py' else tmp_path / 'run' / 'fold0' / 'NAME.pt'
    saved = load_checkpoint(made)
    assert saved['step'] == saved['steps']


def test_commands_that_are_told_lead_from_nothing_to_a_result(finished, tmp_path):
    shutil.copytree(finished[0] / 'faces', tmp_path / 'faces')
    told, scripts = ['python', 'evaluate.py'], []
    while not (tmp_path / 'run' / 'results.json').exists():
        _, path, *words = told
        scripts.append(' '.join([Path(path).name, *(w for w in words if w[:5] == 'stage')]))
        assert len(scripts) < 20, scripts
        told = ['python', 'evaluate.py']
        try:
            sentence = run(tmp_path, Path(path).name, *words, code=2)
        except AssertionError:                                # it ended well
            continue
        told = shlex.split(re.search('first run `(.*?)`', sentence)[1])
    assert set(scripts) == {'evaluate.py', 'train_fr.py', 'reconstruct.py', 'train_mae.py',
                            'train_fr.py stage=teacher', 'train_fr.py stage=judge'}


HALF = 'compare={half: [reconstruct.mask_ratio=0.5]}'


@pytest.mark.parametrize('script, wrong, sentence, advised', [
    ('reconstruct.py', ['reconstruct.mask_ratio=0.5'],
     r'give the other settings a row of their own \(compare\)', [HALF, 'run.row=half']),
    ('reconstruct.py', ['reconstruct.method=noise', 'reconstruct.noise_std=0', 'run.folder=other'],
     'give a greater strength', ['reconstruct.method=noise', 'reconstruct.noise_std=90',
                                 'run.folder=other']),
    ('reconstruct.py', ['reconstruct.method=blur', 'reconstruct.blur_sigma=0.1',
                        'run.folder=other'],
     r'or use reconstruct\.method=none', ['reconstruct.method=none', 'run.folder=other']),
    ('reconstruct.py', ['reconstruct.photos=none'], 'name a folder with photos',
     ['reconstruct.photos=photos']),
    ('evaluate.py', ['--compare', 'evaluate.model=run/fr.pt'], 'leave out --compare',
     ['evaluate.model=run/fr.pt']),
    ('evaluate.py', ['--check', 'mae.batch=5000', 'mae.micro_batch=5000', 'run.folder=new'],
     'use a smaller one', ['--check', 'run.folder=new']),
    ('evaluate.py', ['evaluate.partners=false', 'release=run/reconstructed'],
     'give both paths, release and originals',
     ['evaluate.partners=false', 'release=run/reconstructed', 'originals=faces']),
    ('evaluate.py', ['evaluate.sets=[nowhere.bin]'], 'name it in evaluate.sets by a path',
     ['evaluate.sets=[faces/toy.bin]', 'evaluate.attacks=[judge]']),
    ('evaluate.py', ['evaluate.attacks=[juge]'], 'choose from judge',
     ['evaluate.attacks=[judge]'])])
def test_advice_on_words_of_a_command(finished, tmp_path, script, wrong, sentence, advised):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    folder_of_people(tmp_path / 'people', people=1)
    (tmp_path / 'people' / 'id_000').rename(tmp_path / 'photos')
    assert re.search(sentence, run(tmp_path, script, *wrong, code=2))
    run(tmp_path, script, *advised)


def delete(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize('script, change, sentence, follow', [
    ('reconstruct.py', lambda run: (run / 'release.key').rename(run / 'elsewhere'),
     'put it back', lambda run: (run / 'elsewhere').rename(run / 'release.key')),
    ('reconstruct.py', lambda run: (run / 'reconstructed' / 'property').write_text('x'),
     'delete it, make it again', lambda run: delete(run / 'reconstructed')),
    ('reconstruct.py', lambda run: (run / 'reconstructed' / 'manifest.json').unlink(),
     'move it away', lambda run: (run / 'reconstructed').rename(run / 'elsewhere')),
    ('train_fr.py', lambda run: (run / 'fr.pt').write_bytes(b'x'),
     'download or make it again|download it again', lambda run: delete(run / 'fr.pt')),
    ('evaluate.py', lambda run: shutil.copy(run / 'mask' / 'fr.pt', run),
     'was trained on another release: delete it and run', None),
    ('evaluate.py', lambda run: (run / MEMORY).write_text('{}'),
     'or delete it and name everybody', lambda run: delete(run / MEMORY))])
def test_advice_on_files_of_a_run(finished, tmp_path, script, change, sentence, follow):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    change(tmp_path / 'run')
    told = run(tmp_path, script, code=2)
    assert re.search(sentence, told)
    if follow:
        follow(tmp_path / 'run')
    else:                                          # it tells a command
        delete(tmp_path / 'run' / 'fr.pt')
        run(tmp_path, Path(shlex.split(re.search('`(.*?)`', told)[1])[1]).name)
    run(tmp_path, script)


@pytest.mark.parametrize('words, change, sentence, advised', [
    ([], lambda faces: (faces / 'id_001' / '0.png').write_bytes(b'x'),
     r'or set data\.on_corrupt=skip', ['data.on_corrupt=skip']),
    (['data.size=16', 'mae.patch=8'], None, r'or use data\.on_size=resize',
     ['data.on_size=resize']),
    (['run.folder={}/faces/run'], None, 'set run.folder to a place of its own',
     ['run.folder={}/elsewhere']),
    ([], lambda faces: shutil.copytree(faces / 'id_001', faces / 'ID_001'),
     'give them one name if they are one person', None)])
def test_advice_on_photos(tmp_path, words, change, sentence, advised):
    faces = folder_of_people(tmp_path / 'faces')
    if change:
        change(faces)
    words = [word.format(tmp_path) for word in words]
    with pytest.raises(InputError, match=sentence):
        split(make_config(tmp_path, *words))
    if advised is None:
        delete(faces / 'ID_001')
        advised = []
    split(make_config(tmp_path, *words, *(word.format(tmp_path) for word in advised)))


def test_who_is_public_and_private_is_left_out_as_it_is_told(tmp_path):
    faces, others = folder_of_people(tmp_path / 'faces'), folder_of_people(tmp_path / 'others', 3)
    (faces / 'id_000').rename(faces / 'zoe')
    for person in range(1, 3):
        delete(others / f'id_{person:03}')
    shutil.copytree(faces / 'id_011', others / 'somebody')
    words = [f'data.public={others}', 'data.min_images=1']
    with pytest.raises(InputError) as told:
        split(make_config(tmp_path, *words))
    advice = re.search(r'data\.exclude=\[.*\]', str(told.value))[0]
    assert advice == 'data.exclude=[id_011, zoe]'
    [fold] = split(make_config(tmp_path, *words, advice))
    assert len(fold.released) == 30


@pytest.mark.parametrize('key, sentence', [
    ('configs/toy.key', 'set reconstruct.key= for a secret of your own'),
    ('nowhere', 'or leave it empty to have a new one drawn')])
def test_advice_on_a_key(tmp_path, key, sentence):
    folder_of_people(tmp_path / 'faces')
    with pytest.raises(InputError, match=sentence):
        release_secret(make_config(tmp_path, f'reconstruct.key={key}'))
    assert len(release_secret(make_config(tmp_path, 'reconstruct.key='))) == 32


@pytest.mark.parametrize('wrong', ['mae.epoch=3', 'epochs=3', 'fr.schedul=cosine'])
def test_a_key_that_is_told_exists(wrong):
    with pytest.raises(InputError) as told:
        resolve('configs/toy.yaml', [wrong])
    for key in re.search('did you mean (.*)[?]', str(told.value))[1].split(' or '):
        assert key in SPECS


def test_a_safetensors_file_is_converted_by_the_command_that_is_told(tmp_path):
    """By a stand-in for the package, which the kit does not need."""
    (tmp_path / 'safetensors').mkdir()
    (tmp_path / 'safetensors' / 'torch.py').write_text(
        'import torch\ndef load_file(path):\n    assert open(path).read() == "x"\n'
        '    return {"a": torch.ones(3)}\n')
    path = tmp_path / "my model's.safetensors"
    path.write_text('x')
    with pytest.raises(InputError, match='is a safetensors file') as told:
        load_checkpoint(path)
    _, command = re.findall('`(.*?)`', str(told.value))
    words = [sys.executable, *shlex.split(command)[1:]]
    subprocess.run(words, cwd=tmp_path, check=True)
    assert torch.equal(load_checkpoint(path.with_suffix('.pth'))['a'], torch.ones(3))
