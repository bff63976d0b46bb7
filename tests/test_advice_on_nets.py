"""What sentences on nets, releases and tools advise, followed to the letter as in test_advice.py.
The last test says whether any sentence of the kit is missing in these files and in
test_remedies.py."""
import ast
import errno
import math
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_advice import followed, pictures
from test_data import make_config, write_faces
from test_people import folder_of_people
from test_published import export, folded, onnx_file

import models
from conftest import ROOT, run
from facekit import check
from facekit.base import process
from facekit.base.config import variants
from facekit.base.errors import InputError
from facekit.data import people
from facekit.data.faces import load, load_release
from facekit.nets import embed, published, weights
from facekit.privacy import release
from facekit.privacy.groups import Owned, foreign_groups
from tools import align, bench

CPU = torch.device('cpu')


# ----------------------------------------------------------------------------------- nets

def net_file(path, state, **how):
    """A function that saves something as a checkpoint."""
    return lambda: torch.save(state, path, **how)


STATE = models.iresnet(10, 8, 32, 16).state_dict()


@pytest.mark.parametrize('bad, sentence, follow', [
    (None, 'is missing: check the path', net_file),
    (net_file('net.pt', [torch.ones(2)]), r'not a dict of tensors: save its state_dict\(\)',
     net_file),
    (net_file('net.pt', STATE | {'x': torch.ones(1).expand(9).to_sparse()}),
     r'save dense copies, tensor\.clone\(\)\.contiguous\(\) of each', net_file),
    (net_file('net.pt', STATE, _use_new_zipfile_serialization=False), 'download it again, or',
     net_file),
    (net_file('net.pt', STATE, _use_new_zipfile_serialization=False),
     'or load and save it with a newer torch',
     lambda path, state: lambda: torch.save(torch.load(path), path)),
    (lambda: Path('net.pt').write_bytes(b'PK\3\4' + bytes(99)), 'download or make it again',
     net_file),
    (net_file('net.pt', {'conv1.weight': torch.ones(2)}),
     'it lacks conv1, layer1-4, bn2 or fc, .*; use a backbone of arcface_torch', net_file),
    (net_file('net.pt', STATE | {f'layer1.{n}.x': torch.zeros(1) for n in range(1032)}),
     'or has over 1031 blocks; use a backbone of arcface_torch', net_file),
    (net_file('net.pt', STATE | {'bn2.bias': torch.ones(7)}),
     'use a checkpoint of this architecture or change its keys in the config', net_file),
    (net_file('net.pt', STATE | {'bn2.bias': STATE['bn2.bias'] * math.nan}),
     'holds no finite numbers .*: make it again', net_file)])
def test_advice_on_a_recogniser(tmp_path, monkeypatch, bad, sentence, follow):
    monkeypatch.chdir(tmp_path)
    if bad:
        bad()
    assert followed(lambda: weights.recogniser('net.pt', CPU), sentence,
                    follow('net.pt', STATE)).size == 32


def test_who_asks_for_far_too_much_memory_is_not_used(tmp_path):
    used = [tmp_path / 'bomb.pt', tmp_path / 'net.pt']
    torch.save(STATE, used[1])
    with zipfile.ZipFile(used[0], 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x/data.pkl', bytes(1 << 20))
    followed(lambda: weights.load_checkpoint(used[0]), 'may be malicious: do not use it',
             lambda: used.pop(0))


@pytest.mark.parametrize('damage, script, sentence', [
    ({'logged': 99}, 'train_mae.py', 'and logged 99: delete it and make it again'),
    ({'optimizer': {}, 'step': 3, 'logged': 0}, 'train_mae.py',
     'damaged optimizer, scaler or sums: delete it and make it again'),
    ({'std': -1.0}, 'reconstruct.py', 'damaged mean or std: delete it and make it again'),
    ({'mean': 3}, 'reconstruct.py', 'delete it, make it again or name another'),
    ({'config': {'mae': {'patch': 8, 'dim': -1}, 'data': {'size': 32}}}, 'reconstruct.py',
     'damaged config: delete it and make it again')])
def test_an_mae_that_was_made_again_is_used(whole, damage, script, sentence):
    path = whole / 'run' / 'fold0' / 'mae.pt'
    torch.save(torch.load(path, weights_only=True) | damage, path)
    shutil.rmtree(whole / 'run' / 'reconstructed')
    assert re.search(sentence, run(whole, script, code=2))
    path.unlink()
    run(whole, 'train_mae.py')
    run(whole, script)


def test_advice_on_an_mae_of_other_settings_or_that_is_half_trained(whole, tmp_path):
    shutil.rmtree(whole / 'run' / 'reconstructed')
    told = run(whole, 'reconstruct.py', 'mae.patch=16', code=2)
    assert 'was trained with mae.patch = 8, not 16: set it alike' in told
    path = whole / 'run' / 'fold0' / 'mae.pt'
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {'step': saved['step'] - 1, 'logged': 0}, path)
    told = run(whole, 'reconstruct.py', 'mae.patch=8', code=2)
    command = re.search('is only trained to step 11 of 12: first run `(.*?)` to its end', told)[1]
    run(whole, Path(shlex.split(command)[1]).name)
    run(whole, 'reconstruct.py')


def test_advice_on_weights_to_begin_with(tmp_path):
    mae = models.MAE(32, 8, 32, 2, 2, 32, 1, 2)
    full = mae.state_dict()
    state = {k: v for k, v in full.items() if 'decoder' not in k and 'mask' not in k}
    followed(lambda: weights.load_weights(mae, state, 'mae.pth'),
             'take the full checkpoint, with decoder, of the same pre-training',
             lambda: state.update(full))


def test_a_disk_that_has_room_again_takes_the_checkpoint(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(torch, 'save', full)
        followed(lambda: weights.save_checkpoint(tmp_path / 'x.pt', STATE),
                 'free space and run the same command again', disk.undo)
    assert (tmp_path / 'x.pt').is_file()


def test_advice_on_embeddings_that_are_not_finite(tmp_path, monkeypatch):
    write_faces(tmp_path / 'faces')
    cfg = make_config(tmp_path, 'run.precision=bf16')
    chosen, given = load(tmp_path / 'faces', cfg), [math.inf]
    net = models.iresnet(10, 8, 32, 16).eval()
    monkeypatch.setattr(embed, 'embed_all', lambda net, store, batch, precision, joined:
                        torch.ones(1, 2, 3) * (1.0 if precision == 'fp32' else given[0]))

    def attempt():
        return embed.unit_embeddings(net, chosen.select(np.arange(2)), cfg, CPU)
    followed(attempt, 'set run.precision=fp32, or make it again, or name another',
             lambda: setattr(cfg.run, 'precision', 'fp32'))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_advice_on_published_recognisers(tmp_path, monkeypatch):
    import onnx
    node = onnx.helper.make_node
    flat, net = node('Flatten', ['input'], ['flat']), models.iresnet(10, 8, 48, 16).eval()
    good, used = tmp_path / 'good.onnx', [tmp_path / 'bad.onnx']
    onnx_file(good, node('Flatten', ['input'], ['out']))
    for nodes, constants, sentence in (
            ([flat, node('Gather', ['flat', 'rows'], ['out'])], {'rows': [98, 99]},
             'when it embeds 2 images: export it again, or name another'),
            ([flat, node('Sub', ['flat', 'inf'], ['low']), node('Sqrt', ['low'], ['out'])],
             {'inf': np.float32(np.inf)}, 'for images of noise: export it again, or name another'),
            ([flat, node('ReduceMean', ['flat'], ['out'], axes=[1])], {},
             'not one embedding an image: name a recogniser')):
        onnx_file(used[0], *nodes, **constants)
        followed(lambda: weights.recogniser(used[0], CPU), sentence,
                 lambda: shutil.copy(good, used[0]))
    named = [folded(tmp_path / 'slow.onnx', 100)]
    with monkeypatch.context() as short:
        short.setattr(published, 'LOAD_SECONDS', 0.5)
        followed(lambda: weights.recogniser(named[-1], CPU), 'is not loaded within 0.5 s: export '
                 'it again, or name another recogniser', lambda: named.append(good))
    export(net, used[0], dynamic_axes={'input': {2: 'height', 3: 'width'}})
    followed(lambda: weights.recogniser(used[0], CPU),
             'export it with a fixed image size and its weights inside',
             lambda: export(net, used[0]))
    cfg = make_config(tmp_path, f'teacher.checkpoint={good}')
    torch.save(net.state_dict(), tmp_path / 'net.pt')
    followed(lambda: check.check_checkpoints(cfg), 'gives no gradient: name an IResNet',
             lambda: setattr(cfg.teacher, 'checkpoint', str(tmp_path / 'net.pt')))
    cfg.mae.init = str(tmp_path / 'init.pth')
    followed(lambda: check.check_checkpoints(cfg), 'does not exist: check the path',
             lambda: shutil.copy(tmp_path / 'net.pt', tmp_path / 'init.pth'))


# -------------------------------------------------------------------- releases and attacks

def test_advice_on_a_release_and_its_originals(tmp_path):
    originals = folder_of_people(tmp_path / 'faces')
    cfg = make_config(tmp_path)
    cfg.release = str(tmp_path / 'theirs')
    sentence = 'is missing: check the path, or first run'
    followed(lambda: load_release(variants(cfg, False)[0]), sentence,
             lambda: shutil.copytree(originals, tmp_path / 'theirs'))

    def attempt():
        return foreign_groups(cfg, load(Path(cfg.release), cfg, photos=False), CPU)
    followed(attempt, 'belong together: give both paths',
             lambda: setattr(cfg, 'originals', str(originals)))
    (tmp_path / 'theirs' / 'id_001').rename(tmp_path / 'theirs' / 'somebody')
    followed(attempt, 'give the folders and files of both the same names',
             lambda: (tmp_path / 'theirs' / 'somebody').rename(tmp_path / 'theirs' / 'id_001'))
    names = sorted((tmp_path / 'theirs').iterdir())
    for here, there in zip(names, names[1:] + names[:1]):
        here.rename(there.with_name(f'new_{there.name}'))
    moved = sorted((tmp_path / 'theirs').iterdir())
    for path in moved:
        path.rename(path.with_name(path.name.removeprefix('new_')))

    def same_names():
        shutil.rmtree(tmp_path / 'theirs')
        shutil.copytree(originals, tmp_path / 'theirs')
    followed(attempt, 'in another order, or were not made from them; give both the same names, or '
             'use evaluate.partners=false', same_names)


def test_more_people_are_attacked_by_those_who_know_somebody(tmp_path):
    for folder in ('faces', 'theirs'):
        folder_of_people(tmp_path / folder, 4)
    names = [name for name in map(str, range(40)) if people.share_of(name, 0) < 0.5][:4]
    other = next(name for name in map(str, range(40)) if people.share_of(name, 0) >= 0.5)
    for folder in ('faces', 'theirs'):
        for path, name in zip(sorted((tmp_path / folder).iterdir()), names):
            path.rename(path.with_name(name))
    cfg = make_config(tmp_path)
    cfg.release, cfg.originals = str(tmp_path / 'theirs'), str(tmp_path / 'faces')

    def bring():
        for folder in ('faces', 'theirs'):
            shutil.copytree(folder_of_people(tmp_path / 'more', 5) / 'id_004',
                            tmp_path / folder / other)
            shutil.rmtree(tmp_path / 'more')
    followed(lambda: foreign_groups(cfg, load(Path(cfg.release), cfg, photos=False), CPU),
             'all fall into one half, whose attackers know nobody: bring more people', bring)


def test_the_judge_of_another_run_may_be_named(finished, tmp_path):
    cfg = make_config(tmp_path)
    followed(lambda: Owned(cfg, 0, None, CPU, {}).embedder('judge'),
             'or name the judge of another run by judge.checkpoint=PATH', lambda: setattr(
                 cfg.judge, 'checkpoint', str(finished[0] / 'run' / 'fold0' / 'judge.pt')))


@pytest.mark.parametrize('follow', [
    lambda path, good: path.write_text(good), lambda path, good: path.unlink()])
def test_advice_on_a_key_file(tmp_path, follow):
    cfg = make_config(tmp_path)
    good = release.release_secret(cfg).hex()
    path = release.key_file(cfg)
    path.write_text('no secret')
    followed(lambda: release.release_secret(cfg), 'put the right file back, or, if nothing was '
             'released with it, delete it to have a new one', lambda: follow(path, good))


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_key_that_cannot_be_read_is_made_readable(tmp_path):
    cfg = make_config(tmp_path)
    release.release_secret(cfg)
    path = release.key_file(cfg)
    path.chmod(0)
    followed(lambda: release.release_secret(cfg), 'get the right to read it, or',
             lambda: path.chmod(0o600))


def test_a_key_that_cannot_be_read_may_be_a_copy_that_is_named(tmp_path):
    cfg = make_config(tmp_path)
    secret = release.release_secret(cfg)
    path = release.key_file(cfg)
    shutil.copy(path, tmp_path / 'copy.key')
    path.unlink()
    path.mkdir()                                   # stands for what cannot be read, also by root
    assert followed(lambda: release.release_secret(cfg), 'or name your copy of it in '
                    'reconstruct.key', lambda: setattr(cfg.reconstruct, 'key', str(
                        tmp_path / 'copy.key'))) == secret


def test_advice_on_an_export_and_a_page_of_a_release(whole):
    told = run(whole, 'reconstruct.py', f'reconstruct.export={whole}/faces', code=2)
    assert 'is there already: name a new folder' in told
    run(whole, 'reconstruct.py', f'reconstruct.export={whole}/new')
    shutil.rmtree(whole / 'run' / 'reconstructed')
    told = run(whole, 'reconstruct.py', f'reconstruct.export={whole}/newer', code=2)
    script = Path(shlex.split(re.search('is missing: first run `(.*?)`', told)[1])[1]).name
    run(whole, script)
    run(whole, 'reconstruct.py', f'reconstruct.export={whole}/newer')
    strange = whole / 'run' / 'reconstructed' / 'faces'
    shutil.copytree(whole / 'new', strange)
    told = run(whole, 'reconstruct.py', code=2)
    assert 'which is no part of a release: move it out of that folder' in told
    strange.rename(whole / 'moved')
    assert 'finished and sound' in run(whole, 'reconstruct.py', 'reconstruct.check=true')
    manifest = whole / 'run' / 'reconstructed' / 'manifest.json'
    manifest.write_text(manifest.read_text().replace('facemae', 'facemay'))
    told = run(whole, 'reconstruct.py', code=2)
    assert 'it must not be published; delete it, make it again, and report this' in told
    shutil.rmtree(whole / 'run' / 'reconstructed')
    run(whole, 'reconstruct.py')
    run(whole, 'train_fr.py')
    kept = whole / 'run' / 'mask' / 'release.json'
    kept.write_text('damaged')
    told = run(whole, 'reconstruct.py', 'run.row=mask', code=2)
    assert 'is missing or damaged: put it back, or delete what was made with it' in told
    shutil.rmtree(whole / 'run' / 'mask')
    run(whole, 'reconstruct.py', 'run.row=mask')


def test_warnings_end_where_their_advice_is_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)
    process.say_device('bf16', CPU)
    process.say_device(re.search(r'use run\.precision=(\w+)', capsys.readouterr().out)[1], CPU)
    assert 'use run.precision' not in capsys.readouterr().out
    cfg = make_config(tmp_path)
    release.release_secret(cfg)
    release.key_file(cfg).chmod(0o644)
    release.release_secret(cfg)
    command = re.search('chmod 600 (.*)', capsys.readouterr().out)[0]
    subprocess.run(shlex.split(command), check=True)
    release.release_secret(cfg)
    assert 'warning' not in capsys.readouterr().out


# ----------------------------------------------------------------------------------- tools

def test_advice_on_folders_to_align(tmp_path):
    given = [tmp_path / 'nowhere', tmp_path / 'empty', pictures(tmp_path / 'photos', 'a.png')]
    given[1].mkdir()
    for sentence in ('is no folder: name one with photos, or a list of them',
                     'has no photo .*: name another folder'):
        with pytest.raises(InputError, match=sentence):
            align.photos_in(given.pop(0))
    every = align.photos_in(given[0])
    target = [tmp_path / 'photos' / 'faces', tmp_path / 'faces']
    followed(lambda: align.targets(every, given[0], target[0]),
             'exists, or lies in .*: name a new folder outside of it', lambda: target.pop(0))


def test_advice_on_the_bench(monkeypatch):
    own = SimpleNamespace(steps=4)
    monkeypatch.setattr(bench, 'provenance', lambda device: pytest.skip('it would begin'))
    with pytest.MonkeyPatch.context() as launcher:
        launcher.setattr(process, 'world', lambda: 2)
        with pytest.raises(InputError, match='run it with python, not torchrun'):
            bench.main(own, None, CPU, False)
    with pytest.raises(InputError, match='is too few to measure: use 8 or more'):
        bench.main(own, None, CPU, False)


# ------------------------------------------------------------------ is any sentence missing?

# Of faults of the code nobody can know the remedy; the others put the words of somebody else
# behind their place: of models.py, or of the caller, which are followed above
EDGES = ' ):;,.`'
WITHOUT = 'please report it', 'mae: {}', '{}', '{}: key {} {}', 'run.precision = {}: {}'


def sentences():
    """(place, text) of each InputError of the kit; {} stands for what it fills in."""
    def text(node):
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return ''.join(map(text, node.values))
        if isinstance(node, ast.BinOp):
            return text(node.left) + text(node.right)
        if isinstance(node, ast.IfExp):
            return f'{text(node.body)}{{}}{text(node.orelse)}'
        return '{}'

    for path in [*ROOT.glob('*.py'), *(ROOT / 'facekit').rglob('*.py'),
                 *(ROOT / 'tools').glob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'InputError':
                yield f'{path.name}:{node.lineno}', text(node.args[0])


def test_each_sentence_that_advises_something_is_followed():
    """A test quotes a part of each, of ten letters or more."""
    quoted = set()
    for name in ('test_advice.py', 'test_advice_on_nets.py', 'test_remedies.py',
                 'test_removal.py'):
        for node in ast.walk(ast.parse((ROOT / 'tests' / name).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                plain = re.sub(r'\\([.()\[])', r'\1', node.value)
                quoted |= {part.strip(EDGES) for part in re.split(
                    r'[(]?[.][*][?]?[)]?|\\S[+]|[|]', plain)}

    def is_quoted(text):
        text = text.replace('`{}`', '{}')
        parts = [part.strip(EDGES) for part in text.split('{}')]
        return any(min(len(part), len(quote)) >= 10 and (part in quote or quote in part)
                   for part in parts for quote in quoted)

    missing = [f'{place}: {text}' for place, text in sentences()
               if not text.endswith(WITHOUT[0]) and not text.endswith(WITHOUT[3:])
               and text not in WITHOUT and not is_quoted(text)]
    assert len(list(sentences())) > 100 and not missing, '\n'.join(missing)
