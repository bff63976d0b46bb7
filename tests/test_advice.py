"""What sentences on settings and files advise, followed to the letter: what was refused with a
sentence is accepted once its advice was taken. The rest: test_advice_on_nets.py."""
import pickle
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_config
from test_people import folder_of_people
from test_remedies import delete

import train_fr
from conftest import ROOT, TINY, run, together
from facekit import check
from facekit.base import errors, process
from facekit.base.config import namespace, resolve, variants
from facekit.base.errors import InputError
from facekit.data import bins, images, pairs, people, records, toy
from facekit.data.batches import Order
from facekit.data.faces import load
from facekit.data.sources import open_source
from facekit.nets import published
from facekit.privacy import protect

CPU = torch.device('cpu')
MAGIC = records.MAGIC


def followed(attempt, sentence, follow):
    """attempt() is refused with a sentence, and no more once follow() took its advice."""
    with pytest.raises(InputError, match=sentence):
        attempt()
    follow()
    return attempt()


def change(path, content):
    """A function that gives a file other content, as text or bytes; None deletes it."""
    def do():
        if content is None:
            path.unlink()
        elif isinstance(content, str):
            path.write_text(content)
        else:
            path.write_bytes(content)
    return do


# -------------------------------------------------------------------------------- settings

@pytest.mark.parametrize('wrong, sentence, right', [
    (['mae.epochs=many'], r'does not fit: give float 1e-6\.\.1e9',
     ['mae.epochs=3', 'irm.weight=0']),
    ([f'reconstruct.key={"ab12" * 16}'], 'give the path of a file with the secret',
     ['reconstruct.key=configs/toy.key']),
    (['mae.name=teacher'], 'choose another, such as mae2', ['mae.name=mae2']),
    (['mae'], 'write section.key=value', ['mae.depth=4']),
    (['compare={"a b": []}'], 'use letters, digits, _ and -', ['compare={a_b: []}']),
    (['compare={seed1: []}'], 'do not begin with', ['compare={first: []}']),
    (['irm.warmup_epochs=900'], 'lower it, or', ['irm.warmup_epochs=1']),
    (['irm.warmup_epochs=900'], 'or set irm.weight=0', ['irm.warmup_epochs=900', 'irm.weight=0']),
    (['compare={facemae: []}'], 'rename the row', ['compare={other: []}']),
    (['compare={facemae: []}'], 'or set another reconstruct.method',
     ['compare={facemae: []}', 'reconstruct.method=mask']),
    (['compare={a: [data.size=64]}'], 'set it for all of them', ['data.size=64']),
    (['data.size=50'], 'change one of them', ['data.size=50', 'mae.patch=10']),
    (['reconstruct.method=blur', 'reconstruct.blur_sigma=40', 'compare={}'],
     'give a smaller one', ['reconstruct.method=blur', 'compare={}']),
    (['mae=3'], 'is a section: set mae.KEY', ['mae.depth=3']),
    (['data.root=[faces'], 'is given no YAML: quote it', ['data.root="[faces"']),
    (['run.row=maks'], r"is no row: compare has \['mask'", ['run.row=mask'])])
def test_advice_on_the_words_of_a_config(wrong, sentence, right):
    def attempt(words):
        cfg = namespace(resolve(ROOT / 'configs' / 'toy.yaml', words))
        return variants(cfg, compare='run.row' not in words[0])
    with pytest.raises(InputError, match=sentence):
        attempt(wrong)
    assert attempt(right)


@pytest.mark.parametrize('text, sentence, right', [
    (None, 'does not exist: name a file such as', ''),
    ('{', 'is no readable YAML .* name a file such as', ''),
    ('- mae', 'has other lines than "section:" and "  key: value"', 'mae:\n  depth: 4\n'),
    ('base: config.yaml', 'base leads round in a circle: remove one of them', 'mae: {depth: 4}')])
def test_advice_on_a_config_file(tmp_path, text, sentence, right):
    path = tmp_path / 'config.yaml'
    if text:
        path.write_text(text)
    with pytest.raises(InputError, match=sentence) as told:
        resolve(path)
    if named := re.search('a file such as (.*)', str(told.value)):
        path = ROOT / named[1]
    else:
        path.write_text(right)
    assert resolve(path)


@pytest.mark.parametrize('wrong, sentence', [
    ({'WORLD_SIZE': 'two'}, 'start the script with torchrun, or unset .*WORLD_SIZE'),
    ({'WORLD_SIZE': '2', 'RANK': '0'}, 'start the script with torchrun, or unset WORLD_SIZE'),
    ({'SLURM_PROCID': '1'}, 'start torchrun by it, one a node')])
def test_advice_on_the_environment(finished, tmp_path, wrong, sentence):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in wrong.items():
            patch.setenv(name, value)
        assert re.search(sentence, run(tmp_path, 'train_fr.py', code=2))
    run(tmp_path, 'train_fr.py')                                       # unset
    two = together(tmp_path, 'train_fr.py', **{k: v for k, v in wrong.items() if 'SLURM' in k})
    assert [one.wait() for one in two] == [0, 0]                       # as torchrun starts them


def test_advice_on_processes_and_their_batches(monkeypatch):
    cfg = SimpleNamespace(run=SimpleNamespace(device='auto'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_RANK', '1')
    followed(lambda: process.choose_device(cfg), 'or use run.device=cpu',
             lambda: setattr(cfg.run, 'device', 'cpu'))
    monkeypatch.setattr(process, 'world', lambda: 3)
    monkeypatch.setattr(process, 'rank', lambda: 0)
    batch = [16]
    followed(lambda: process.own_share(batch[0], 'fr.batch'), 'by 3 processes: use 15',
             lambda: batch.append(batch.pop() - 1))
    c = SimpleNamespace(norm_batch=8, batch=20)
    share = [slice(0, 10)]
    followed(lambda: train_fr.norm_batch(share[0], c), 'use fewer processes, or',
             lambda: share.insert(0, slice(0, 16)))
    followed(lambda: train_fr.norm_batch(share[1], c), r'or fr\.norm_batch=10 in every run',
             lambda: setattr(c, 'norm_batch', 10))
    wanted = [9]
    followed(lambda: Order(8, wanted[0], 0, 'fr.batch'), 'of 8 images: use a smaller one',
             lambda: wanted.insert(0, 8))


def test_advice_on_packages_and_protections(monkeypatch):
    def attempt():
        return errors.optional('onnx', 'onnx')
    with pytest.MonkeyPatch.context() as missing:
        missing.setitem(sys.modules, 'onnx', None)
        followed(attempt, 'run `pip install onnx`, or leave out what needs it',
                 lambda: missing.undo())
    with pytest.MonkeyPatch.context() as missing:
        missing.setattr(published.importlib.util, 'find_spec', lambda name: None)
        with pytest.raises(InputError, match='run `pip install face-recognition-models`'):
            published.dlib_weights()
    with pytest.MonkeyPatch.context() as broken:
        broken.setitem(sys.modules, 'torchvision.transforms.v2.functional', None)
        followed(protect.gaussian_blur, 'install torch and torchvision together',
                 lambda: broken.undo())
    cfg = namespace(resolve(TINY, ['reconstruct.method=blur']))
    monkeypatch.setitem(protect.PROTECTIONS, 'blur', protect.Method(protect.masked, 'darkness'))
    followed(lambda: check.check_models(cfg), 'has no key reconstruct.darkness: add it there',
             lambda: setattr(cfg.reconstruct, 'darkness', 0.5))


# ------------------------------------------------------------------------------ data sets

def pictures(folder, *names):
    """Different drawn faces under some names in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(images.encode(toy.draw([i], [i], 32)[0], 'png'))
    return folder


def lost_part(content):
    """A .rec whose second magic word inside a record lost its mark."""
    at = content.index(MAGIC, content.index(b'abcd') + 4)
    return content[:at + 4] + b'\0\0\0\0' + content[at + 8:]


def without_line(number):
    return lambda content: b''.join(
        line for i, line in enumerate(content.splitlines(True)) if i != number)


@pytest.mark.parametrize('name, damage, sentence', [
    ('train.idx', lambda x: x[:-2] + b'?\n', 'not all lines .*: copy it again'),
    ('train.idx', lambda x: b'', 'check the path, copy the file again; a .rec needs its .idx'),
    ('train.rec', lambda x: x[:len(x) // 2], 'copy the .rec and the .idx again'),
    ('train.idx', without_line(3), 'the index lacks some: copy both files again'),
    ('train.rec', lost_part, 'lacks the part of its record .*: copy the file again'),
    ('toy.bin', lambda x: x[:50], 'copy it again or pack it anew')])
def test_files_that_were_copied_again_are_read(tmp_path, name, damage, sentence):
    one = images.encode(toy.draw([0], [0], 32)[0], 'png')
    records.write_records(tmp_path, [b'abcd' + MAGIC + b'efgh', one, one, one],
                          np.array([0, 0, 1, 1]), 32)
    bins.write_bin(tmp_path / 'toy.bin', [one, one], [True])
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damage(whole))

    def attempt():
        bins.read_bin(tmp_path / 'toy.bin')
        return [bytes(file) for file in records.Records(tmp_path)]
    assert len(followed(attempt, sentence, change(tmp_path / name, whole))) == 4


@pytest.mark.parametrize('label, image, key, sentence', [
    (1, b'y', 1, 'pack the set anew with a key for each image'),
    (1, b'', 2, 'has no image: pack the set anew without it'),
    (-1, b'y', 2, 'has no label from 0 .*: pack the set anew')])
def test_records_that_were_packed_anew_are_read(tmp_path, label, image, key, sentence):
    """The second of two is wrong."""
    first, second = (records.pack(records.payload(*what)) for what in (
        (0, 1, b'x'), (label, key, image)))
    change(tmp_path / 'train.rec', first + second)()
    change(tmp_path / 'train.idx', f'1\t0\n{key}\t{len(first)}\n')()
    sound = [part for part in (b'x', image) if part]
    followed(lambda: records.Records(tmp_path), sentence, lambda: records.write_records(
        tmp_path, sound, np.arange(len(sound)), 32))


@pytest.mark.parametrize('labels, sentence, right', [
    ([1, 0], 'give one image file for each label, sorted by identity, counted from 0', [0, 1]),
    ([], 'make no set: give at least one', [0, 1])])
def test_advice_on_writing_records(tmp_path, labels, sentence, right):
    given = [labels]
    followed(lambda: records.write_records(tmp_path, [b'x'] * len(given[0]),
                                           np.array(given[0]), 32), sentence,
             lambda: given.insert(0, right))


@pytest.mark.parametrize('path, wrong, sentence, right', [
    ('list.txt', 'jörg.png A\n2.png B\n'.encode('latin1'), 'no text in UTF-8: save it as such',
     {'list.txt': 'jörg.png A\n2.png B\n'}),
    ('list.txt', 'a b.png A\n2.png B\n', 'names with blanks need a comma between them',
     {'list.txt': 'a b.png, A\n2.png, B\n'}),
    ('sub/list.txt', '../2.png A\n../3.png B\n', 'put the list above all its images',
     {'list.txt': '2.png A\n3.png B\n'}),
    ('list.txt', '2.png A\n4.png B\n', 'which is not there: copy it there', {'4.png': b'x'}),
    ('list.txt', '2.png A\n3.png B\n4.png B\n', 'or remove the line',
     {'list.txt': '2.png A\n3.png B\n'}),
    ('list.txt', '2.png A\n3.png B\n2.png A\n', 'once more: remove one line',
     {'list.txt': '2.png A\n3.png B\n'}),
    ('list.txt', '\n', 'give lines such as `000001.jpg 2880`', {'list.txt': '2.png 1\n3.png 2\n'}),
    ('list.txt', '2.png A\n3.png A\n', 'of one person only, A: give each image its label',
     {'list.txt': '2.png A\n3.png B\n'}),
    ('.', None, 'name a folder with one sub-folder per person',
     {'A/1.png': b'x', 'B/1.png': b'x'}),
    ('.', None, 'or a list of who is who', {'list.txt': '2.png A\n3.png B\n'}),
    ('list', '2.png A\n3.png B\n', r'set data.root to .* or to a list of who is who \(.txt\)',
     {'list.txt': '2.png A\n3.png B\n'})])
def test_advice_on_a_folder_or_a_list(tmp_path, path, wrong, sentence, right):
    pictures(tmp_path, 'jörg.png', 'a b.png', '2.png', '3.png')
    (tmp_path / 'sub').mkdir()
    used = [tmp_path / path]
    if wrong:
        change(used[0], wrong)()

    def follow():
        for name, content in right.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            change(tmp_path / name, content)()
        if 'list.txt' in right:
            used.insert(0, tmp_path / 'list.txt')
    assert len(followed(lambda: open_source(used[0]), sentence, follow).people) == 2


@pytest.mark.parametrize('wrong, sentence', [
    (None, r'\(DCFace keeps them in list.txt beside the .rec\)'),
    ('1\ta/1.jpg\n2\tb.jpg\n', 'which says whose image a record is: mend it'),
    ('1\ta/1.jpg\n2\tb/1.jpg\n2\ta/1.jpg\n', 'keep the line of the person whom it shows'),
    ('1\ta/1.jpg\n', 'has no line for record 2 of .*: copy both files again')])
def test_advice_on_records_of_one_label(tmp_path, wrong, sentence):
    records.write_records(tmp_path, [b'x', b'y'], [0, 0], 32)                  # keys 1 and 2
    if wrong:
        (tmp_path / 'list.txt').write_text(wrong)
    followed(lambda: open_source(tmp_path), sentence,
             change(tmp_path / 'list.txt', '1\ta/1.jpg\n2\tb/1.jpg\n'))


def test_a_bin_of_arrays_is_packed_as_it_is_told(tmp_path):
    one = images.encode(toy.draw([0], [0], 32)[0], 'png')
    arrays = [np.frombuffer(one, np.uint8)] * 2
    change(tmp_path / 'x.bin', pickle.dumps((arrays, [True]), protocol=2))()
    same = followed(lambda: bins.read_bin(tmp_path / 'x.bin'), r'with image.tobytes\(\) for each',
                    lambda: bins.write_bin(tmp_path / 'x.bin', [x.tobytes() for x in arrays],
                                           [True]))[1]
    assert same.tolist() == [True]


@pytest.mark.parametrize('content, sentence, follow', [
    ('gif', 'convert, copy or remove the image',
     lambda path: Image.open(path).convert('RGB').save(path, 'PNG')),
    ('gif', 'or remove the image', lambda path: path.unlink()),
    ('half', 'damaged or cut off .*: copy or remove the image',
     lambda path: path.write_bytes(images.encode(toy.draw([0], [0], 32)[0], 'png'))),
    ('large', 'shrink or remove the image', lambda path: Image.open(path).resize((32, 32)).save(
        path, 'PNG')),
    ('small', 'change it, or use data.on_size=resize', lambda path: Image.open(path).resize(
        (32, 32)).save(path, 'PNG'))])
def test_advice_on_an_image(tmp_path, content, sentence, follow):
    folder_of_people(tmp_path / 'faces', 2)
    path = tmp_path / 'faces' / 'id_000' / '0.png'
    picture = Image.open(path).convert('RGB')
    if content == 'half':
        path.write_bytes(path.read_bytes()[:200])
    else:
        size = {'gif': 32, 'large': 5000, 'small': 16}[content]
        picture.resize((size, size)).save(path, 'GIF' if content == 'gif' else 'PNG')
    followed(lambda: load(tmp_path / 'faces', make_config(tmp_path)), sentence,
             lambda: follow(path))


def test_a_set_without_a_sound_image_is_copied_again(tmp_path):
    folder_of_people(tmp_path / 'faces', 2)
    cfg = make_config(tmp_path, 'data.on_corrupt=skip')
    whole = {path: path.read_bytes() for path in (tmp_path / 'faces').rglob('*.png')}
    for path in whole:
        path.write_bytes(b'x')
    followed(lambda: load(tmp_path / 'faces', cfg), 'not one image .*: copy the data set again',
             lambda: [path.write_bytes(content) for path, content in whole.items()])


# ---------------------------------------------------------------------- pairs and people

PAIRS = 'a.png b.png 1\n' * 6 + 'a.png c.png 0\n' * 6


@pytest.mark.parametrize('wrong, sentence, name, content', [
    (PAIRS + 'a.png b.png\n', 'see docs/usage.md for the form', 'list.txt', PAIRS),
    (PAIRS + 'a.png x.png 0\n', 'which is not there: copy it there', 'x.png', None),
    (PAIRS + 'a.png x.png 0\n', 'or remove the line', 'list.txt', PAIRS),
    (PAIRS + './b.png a.png 0\n', 'says the contrary: remove the wrong one', 'list.txt', PAIRS),
    ('a.png b.png 1\n' * 12, 'needs both kinds, and 10 pairs or more', 'list.txt', PAIRS)])
def test_advice_on_a_list_of_pairs(tmp_path, wrong, sentence, name, content):
    pictures(tmp_path, 'a.png', 'b.png', 'c.png')
    (tmp_path / 'list.txt').write_text(wrong)
    content = content or (tmp_path / 'c.png').read_bytes()
    followed(lambda: pairs.load_pairs(tmp_path / 'list.txt', 32), sentence,
             change(tmp_path / name, content))


def test_advice_on_sets_of_pairs(tmp_path):
    for name in ('one', 'two'):
        pictures(tmp_path / name, 'a.png', 'b.png', 'c.png')
        (tmp_path / name / 'x.txt').write_text('a.png b.png 1\n' * 6 + 'a.png c.png 0\n' * 6)
    cfg = make_config(tmp_path, f'evaluate.sets=[{tmp_path}/one/x.txt, {tmp_path}/two/x.txt]')

    def rename():
        (tmp_path / 'two' / 'x.txt').rename(tmp_path / 'two' / 'y.txt')
        cfg.evaluate.sets[1] = f'{tmp_path}/two/y.txt'
    assert len(followed(lambda: pairs.load_pair_sets(cfg, 32), 'rename a file', rename)) == 2
    folder_of_people(tmp_path / 'faces', 24)
    cfg = make_config(tmp_path, 'data.validation=0.05')
    followed(lambda: pairs.check_held_back(people.split(cfg)[0]), 'raise data.validation',
             lambda: setattr(cfg.data, 'validation', 0.5))


@pytest.mark.parametrize('sentence, change_cfg', [
    ('change data.folds, data.release_folds', lambda cfg, path: setattr(cfg.data, 'folds', 2)),
    ('data.min_images or data.validation', lambda cfg, path: setattr(cfg.data, 'min_images', 1)),
    ('or set data.public to another data set', lambda cfg, path: (
        setattr(cfg.data, 'public', str(path)), setattr(cfg.data, 'min_images', 1)))])
def test_advice_on_a_split_with_an_empty_side(tmp_path, sentence, change_cfg):
    folder_of_people(tmp_path / 'faces', 6)
    others = pictures(tmp_path / 'others', *(f'{who}/{i}.png' for who in 'xy' for i in range(3)))
    for i, path in enumerate(sorted(others.rglob('*.png'))):
        path.write_bytes(images.encode(toy.draw([90 + i], [i], 32)[0], 'png'))
    cfg = make_config(tmp_path, 'data.folds=50' if 'folds' in sentence else 'data.min_images=9')
    followed(lambda: people.split(cfg), sentence, lambda: change_cfg(cfg, others))


def test_a_name_that_is_told_is_left_out(tmp_path):
    folder_of_people(tmp_path / 'faces')
    with pytest.raises(InputError, match='is called so: people there have names such as') as told:
        people.split(make_config(tmp_path, 'data.exclude=[id_05]'))
    name = re.search('such as (.*?)[ ;]', str(told.value))[1]
    assert people.split(make_config(tmp_path, f'data.exclude=[{name}]'))


def test_advice_on_whom_nets_learnt_from(whole):
    """Each net is told in turn."""
    wanted = 'reconstruct.py', 'data.split_seed=5', 'run.row='
    told = run(whole, *wanted, code=2)
    assert 'change it back (people are taken out by data.exclude), or delete the file and' in told
    run(whole, 'reconstruct.py')                                         # changed back
    waiting = [wanted]
    while waiting:
        try:
            told = run(whole, *waiting[-1], code=2)
        except AssertionError:                                           # it ended well
            waiting.pop()
            continue
        delete(whole / re.search(r'error: (\S+)', told)[1])
        if command := re.search('delete the file and run `(.*?)`', told):
            script, *words = shlex.split(command[1])[1:]
            waiting.append((Path(script).name, *words[2:]))
        assert len(waiting) < 4
    run(whole, *wanted)
