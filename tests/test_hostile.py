"""Hostile JSON of a run; and what sentences advise, followed to the letter."""
import json
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import hostile
from conftest import run
from facekit.base import files
from facekit.base.errors import InputError
from facekit.base.log import StageLog, read_log, stage_seconds
from facekit.nets.weights import load_checkpoint

SOUND = {'made_from': {'set of images': 'abc', 'data.size': '32'}, 'rows': [1, 2.5, None],
         'names': {'José': [True, 'x'] * 9}}
DEEP = 10 ** 5


def json_files():
    """Hostile texts, and then as many mutations of sound ones as are asked for."""
    yield from (b'', b'{', b'[]', b'3', b'null', b'"a"', b'\xff\xfe{}', b'{"a": \xe9}',
                '{}'.encode('utf-16'), b'{"a": ' + b'9' * 400 + b'}', b'[' * DEEP,
                b'{"a":' * DEEP, b'{"a":' * 200 + b'1' + b'}' * 200,
                b'{"a": ' + b'[' * 60 + b']' * 60 + b'}', b'{"a": ' + b'[' * DEEP + b']' * DEEP)
    chance = random.Random(0)
    while True:
        yield hostile.mutated(json.dumps(SOUND).encode(), chance)


def try_out(read, count):
    """How often read(content) of hostile JSON gave an object, and how often one sentence."""
    found = {'read': 0, 'refused': 0}
    for _, content in zip(range(count), json_files()):
        try:
            assert isinstance(read(content), dict)
            found['read'] += 1
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 300
            found['refused'] += 1
    return found


@pytest.mark.parametrize('count', [300, pytest.param(3000, marks=pytest.mark.long)])
def test_hostile_json_of_a_run_is_read_or_refused_in_one_sentence(tmp_path, count):
    path = tmp_path / 'release.json'

    def read(content):
        path.write_bytes(content)
        found = files.read_json(path)
        float(sum(x for x in found.values() if isinstance(x, int)))       # of 400 digits: it fails
        return found

    found = try_out(read, count)
    assert found['read'] > count / 20 and found['refused'] > count / 3
    for make in hostile.SPECIAL:
        path.unlink()
        make(path)
        with pytest.raises(InputError, match='is missing or damaged'):
            files.read_json(path)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        path.touch()


def test_what_we_write_is_read_back(tmp_path):
    files.write_json(tmp_path / 'a.json', SOUND)
    assert files.read_json(tmp_path / 'a.json') == SOUND


def test_hostile_lines_of_a_log_are_passed_over(tmp_path):
    path = tmp_path / 'log' / 'student.jsonl'
    path.parent.mkdir()
    texts = [content.replace(b'\n', b' ') for _, content in zip(range(300), json_files())]
    path.write_bytes(b'\n'.join([*texts, b'{"step": 4, "seconds": 2.5}', b'{"step": ' + b'9' * 400
                                 + b'}', b'{"step": 5, "seconds": ' + b'9' * 400 + b'}']))
    assert [entry['step'] for _, entry in read_log(path)] == [4]
    StageLog(tmp_path, 'student', 10, 5)(6, 1, loss=1.0)
    assert stage_seconds(tmp_path)['student'] == 2.5


# ------------------------------------------------------------- what sentences advise, followed

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
