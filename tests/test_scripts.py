"""The scripts as users run them: the pipeline, several processes, wrong inputs."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import train_mae
from conftest import ENVIRONMENT, ROOT, TINY, log_lines, run, tensors
from facekit.base import process
from facekit.base.config import namespace, resolve, variants
from facekit.base.errors import InputError
from facekit.check import check_experiment
from facekit.data import faces, images, records, toy
from facekit.data.people import split
from facekit.forecast import remaining
from facekit.privacy import attacks, protect


def test_the_pipeline_writes_what_it_promises(finished):
    folder, printed = finished
    results, mask, originals = (json.loads((folder / 'run' / row / 'results.json').read_text())
                                for row in ('', 'mask', 'originals'))
    comparison = json.loads((folder / 'run' / 'comparison.json').read_text())
    floor = comparison['rows'].pop('pixel components')
    assert comparison['rows'] == {'facemae': [results], 'mask': [mask], 'originals': [originals]}
    assert comparison['ahead'].keys() == {'mask', 'originals'} and list(floor[0]) == [
        'verification']
    toy = results['verification']['toy']
    assert {'accuracy', 'std', 'auc', 'tar@far=1e-3', 'sha256'} <= set(toy)
    assert {'rank1', 'each_person_once', 'chance', 'ceiling', 'way'} <= set(
        results['privacy']['judge_same_image'])
    assert results['privacy']['pixels_same_image']['chance'] == pytest.approx(1 / 60)
    assert originals['privacy']['pixels_same_image']['rank1'] == 1
    assert originals['reconstruction']['psnr'] > 90                  # PNG: nothing is lost
    assert {'commit', 'torch', 'device'} <= set(results['made_with'])
    assert results['people']['people'] == 10 and results['people']['of_people'] == 24
    assert results['left_out']['private'] == {'damaged images': 0,
                                              'images equal to another one': 0}
    assert results['config']['mae']['dim'] == 32 and results['seconds']['train_mae/fold0/mae'] > 0
    assert {'linear_same_image', 'masked_same_image', 'guess_same_image', 'trained_same_image',
            'class_label', 'repeated_same_image', 'membership_recogniser',
            'pixels_same_person'} <= set(
                results['privacy'])
    for figure in ('release.png', 'mask.png', 'roc.png', 'tradeoff.png',
                   'release_most_linked.png', 'mask_most_linked.png'):
        assert (folder / 'run' / 'figures' / figure).stat().st_size > 1000
    assert 'facemae' in printed and ' left ' in printed
    [said] = re.findall('^releases  (.*)', printed, re.MULTILINE)
    assert said == 'run/reconstructed, run/mask/reconstructed'          # none that shows originals
    table = (folder / 'run' / 'table.txt').read_text().splitlines()
    assert max(map(len, table)) <= 80 and any('originals' in line for line in table)


def test_a_release_is_exported_as_folders_of_its_image_files(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    out, words = tmp_path / 'out', 'reconstruct.export=out'
    assert '60 images of 10 people' in run(tmp_path, 'reconstruct.py', words)
    release = records.Records(tmp_path / 'run' / 'reconstructed')
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*.*')}
    assert found == {f'{label}/{i:02}.png': bytes(release[i])
                     for i, label in enumerate(release.labels)}
    assert sorted(path.name for path in out.iterdir()) == list('0123456789')
    assert 'out is there already' in run(tmp_path, 'reconstruct.py', words, code=2)
    assert len(list(out.rglob('*.*'))) == 60
    run(tmp_path, 'reconstruct.py', 'run.row=originals', 'reconstruct.export=originals')
    assert (tmp_path / 'originals').stat().st_mode & 0o077 == 0
    with open(tmp_path / 'run' / 'mask' / 'reconstructed' / 'train.rec', 'ab') as file:
        file.write(b'x')
    said = run(tmp_path, 'reconstruct.py', 'run.row=mask', 'reconstruct.export=mask', code=2)
    assert 'other files than when it was published' in said
    shutil.rmtree(tmp_path / 'run' / 'reconstructed')
    assert 'is missing: first run' in run(tmp_path, 'reconstruct.py', 'reconstruct.export=x',
                                          code=2)


def test_the_release_is_insightfaces_and_says_nothing_of_its_source(finished):
    folder = finished[0]
    release = records.Records(folder / 'run' / 'reconstructed')
    assert len(release) == 60 and np.bincount(release.labels).tolist() == [6] * 10
    secret = (folder / 'run' / 'release.key').read_text().strip()
    derived = hashlib.sha256(bytes.fromhex(secret))                # all that a mask needs
    for path in (folder / 'run').rglob('*'):
        if path.is_file() and path.name != 'release.key':
            content = path.read_bytes()
            assert not any(form in content for form in (
                secret.encode(), derived.hexdigest().encode(), derived.digest())), path
    for path in (folder / 'run' / 'reconstructed').iterdir():
        assert not any(word in path.read_bytes() for word in (
            str(folder).encode(), b'seed', b'faces/')), path


def test_finished_stages_do_nothing_and_changed_configs_are_refused(finished):
    folder = finished[0]
    before = {p: p.stat().st_mtime_ns for p in (folder / 'run').rglob('*.pt')}
    assert 'nothing to do' in run(folder, 'train_mae.py')
    assert 'nothing to do' in run(folder, 'train_fr.py', 'stage=teacher')
    assert 'nothing to do' in run(folder, 'reconstruct.py', '--compare')
    printed = run(folder, 'train_mae.py', 'irm.weight=0.5', code=2)
    assert 'irm.weight (0.1 then, 0.5 now)' in printed and 'Traceback' not in printed
    assert 'reconstruct.quality' in run(folder, 'reconstruct.py', 'reconstruct.quality=7', code=2)
    assert before == {p: p.stat().st_mtime_ns for p in (folder / 'run').rglob('*.pt')}


def test_two_processes_give_what_one_gives(copied, finished):
    """Same masks, same losses; the student up to rounding, BatchNorm included. Releases of two
    processes: test_interrupt.py; comparisons: test_processes.py."""
    run(copied, 'train_mae.py', processes=2)
    one, two = (log_lines(f, 'train_mae/fold0/mae') for f in (finished[0], copied))
    assert [x['step'] for x in one] == [x['step'] for x in two]
    for key in ('mse', 'irm'):
        np.testing.assert_allclose([x[key] for x in one], [x[key] for x in two], rtol=1e-3)
    for count in (1, 2):        # other thread counts round otherwise, and SGD amplifies that
        run(copied, 'train_fr.py', 'release=run/mask/reconstructed', f'run.folder=run{count}',
            processes=count)
    one, two = (torch.load(copied / f'run{n}' / 'fr.pt', weights_only=True) for n in (1, 2))
    for key, value in one['net'].items():
        if 'num_batches' not in key:       # counts the parts that this process saw; never used
            torch.testing.assert_close(value, two['net'][key], rtol=1e-5, atol=1e-6, msg=key)


def test_streaming_gives_bit_for_bit_what_memory_gives(copied, finished, monkeypatch):
    monkeypatch.setattr(faces, 'memory_for', lambda *_: (None, 'as they are read'))
    for script in ('train_mae.py', 'reconstruct.py', 'train_fr.py'):
        assert ('decoded as they are read' in run(copied, script)) == (script != 'reconstruct.py')
    for name in ('fold0/mae.pt', 'fr.pt'):
        one, two = (torch.load(f / 'run' / name, weights_only=True) for f in (finished[0], copied))
        assert one['made_from'] == two['made_from']
        for key, value in tensors(one).items():
            assert torch.equal(value, tensors(two)[key]), key
    for name in ('train.rec', 'train.idx', 'manifest.json'):
        one, two = ((f / 'run' / 'reconstructed' / name).read_bytes()
                    for f in (finished[0], copied))
        assert one == two


def test_attacks_are_kept_until_something_changes(whole):
    """A comparison over several sittings does not attack finished rows again, and what is
    evaluated with few attackers keeps what others found."""
    path, comparison = whole / 'run/mask/results.json', whole / 'run/comparison.json'
    first, table = json.loads(path.read_text()), comparison.read_bytes()
    few = 'run.row=mask', 'evaluate.attacks=[judge, pixels]'
    printed = run(whole, 'evaluate.py', *few, 'evaluate.sets=[]', 'run.log_every=1',
                  'evaluate.batch=60', 'reference={x: {source: y, toy: 1.0}}')
    assert 'repeated, membership are kept' in printed and '[evaluate/mask]' not in printed
    assert 'results   run/mask/results.json' in printed and 'report.html' not in printed
    again = json.loads(path.read_text())
    for key in ('privacy', 'attacked', 'reconstruction'):
        assert again[key] == first[key]
    # A recogniser that is named by its file is another attacker as soon as the file is another
    for net in ('judge', 'teacher'):
        shutil.copy(whole / f'run/fold0/{net}.pt', whole / 'backbone.pt')
        printed = run(whole, 'evaluate.py', few[0], 'evaluate.attacks=[backbone.pt]')
        assert '[evaluate/mask] 100 %' in printed
    assert comparison.read_bytes() == table
    # Rows that are still to come are named, and the table is of the others
    printed = run(whole, 'evaluate.py', '--compare', 'compare_seeds=[0, 1]', few[1],
                  'evaluate.centred=true')
    assert 'left out: facemae (seed 1), mask (seed 1), originals (seed 1)' in printed
    assert 'toy centred' in printed and 'facemae minus' in printed
    rows = json.loads(comparison.read_text())['rows']
    assert rows['mask'][0]['privacy'].keys() > first['privacy'].keys()
    state = torch.load(whole / 'run' / 'fold0' / 'judge.pt', weights_only=True)
    state['net']['fc.bias'] += 1
    torch.save(state, whole / 'run' / 'fold0' / 'judge.pt')
    assert 'are kept' not in run(whole, 'evaluate.py', *few)
    assert json.loads(path.read_text())['attacked'].keys() == {'judge', 'pixels'}
    mae = whole / 'run' / 'fold0' / 'mae.pt'
    sound, state = mae.read_bytes(), torch.load(mae, weights_only=True)
    torch.save(state | {'std': state['std'] + 1}, mae)
    assert 'made with another mae' in run(whole, 'evaluate.py', few[1], code=2)
    mae.write_bytes(sound)
    (whole / 'run' / 'release.key').write_text(hashlib.sha256(b'another').hexdigest())
    assert 'made with another secret' in run(whole, 'evaluate.py', *few, code=2)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a compiler')
def test_a_compiled_recogniser_learns_the_same(finished, tmp_path):
    """The plain twin of run.compile: equal losses until rounding grows, here in the third step."""
    shutil.copytree(finished[0] / 'faces', tmp_path / 'faces')
    losses = []
    for compiled in ('true', 'false'):
        run(tmp_path, 'train_fr.py', 'stage=teacher', 'run.log_every=1',
            f'run.compile={compiled}')
        losses.append([line['loss'] for line in log_lines(tmp_path, 'teacher/fold0')][:2])
        shutil.rmtree(tmp_path / 'run')
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_micro_batches_do_not_change_the_gradient(copied, finished):
    run(copied, 'train_mae.py', 'mae.micro_batch=7', 'mae.name=small')
    one = log_lines(finished[0], 'train_mae/fold0/mae')
    two = log_lines(copied, 'train_mae/fold0/small')
    for key in ('mse', 'irm', 'relations'):
        np.testing.assert_allclose([x[key] for x in one], [x[key] for x in two], rtol=1e-3)


@pytest.mark.parametrize('script, arguments, told', [
    ('train_mae.py', 'run.folder=empty', 'teacher.pt is missing.*stage=teacher'),
    ('reconstruct.py', 'run.folder=empty', 'mae.pt.*python .*train_mae.py'),
    ('train_fr.py', 'run.folder=empty', 'reconstructed.*python .*reconstruct.py'),
    ('evaluate.py', 'run.folder=empty', 'reconstructed.*python .*reconstruct.py'),
    ('train_fr.py', 'stage=teacher run.folder=other fr.batch=2000', '(?=.*2000).*fr.batch'),
    ('train_mae.py', 'data.folds=1', '(?=.*data.folds).*data.public'),
    ('reconstruct.py', 'reconstruct.photos=nowhere', 'nowhere does not exist'),
    ('reconstruct.py', 'reconstruct.photos=run/log', 'holds no photo'),
    ('evaluate.py', 'judge.checkpoint=run/none.pt',
     'run/none.pt is missing: check the path')])
def test_a_wrong_input_is_one_sentence_with_exit_code_2(finished, script, arguments, told):
    printed = run(finished[0], script, *arguments.split(), code=2)
    last = printed.strip().splitlines()[-1]
    assert last.startswith('error: ') and 'Traceback' not in printed
    assert re.search(told, last), last


@pytest.mark.parametrize('supported', [True, False])
def test_the_device_is_said_and_named_if_it_emulates_bf16(monkeypatch, capsys, supported):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: supported)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: supported)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA T4')
    for device, name, remedy in (('cpu', f'CPU, {os.cpu_count()} cores', 'fp32'),
                                 ('cuda', 'NVIDIA T4', 'fp16')):
        process.say_device('bf16', torch.device(device))
        said = capsys.readouterr().out
        assert said.startswith(f'device: {name}') and 'precision: bf16; processes: 1\n' in said
        assert (f'use run.precision={remedy}' in said) != supported


def test_published_checkpoints_and_foreign_releases_are_evaluated(finished, tmp_path):
    folder = finished[0]
    own = (folder / 'run' / 'results.json').read_text()
    student = torch.load(folder / 'run' / 'fr.pt', weights_only=True)['net']
    torch.save({f'module.{k}': v for k, v in student.items()}, tmp_path / 'backbone.pth')
    printed = run(folder, 'evaluate.py', f'evaluate.model={tmp_path}/backbone.pth')
    assert 'results   run/external.json' in printed and 'reconstructed' not in printed
    assert 'backbone.pth' in printed and 'table.txt' not in printed
    theirs = json.loads((folder / 'run' / 'external.json').read_text())['verification']
    assert theirs == json.loads(own)['verification']
    printed = run(folder, 'evaluate.py', 'release=run/originals/reconstructed', 'run.folder=other',
                  'originals=run/originals/reconstructed', 'judge.checkpoint=run/fold0/judge.pt')
    assert 'no utility and no insider' in printed
    found = json.loads((folder / 'other' / 'external.json').read_text())['privacy']
    assert found['judge_same_image']['rank1'] == 1 and 'insider_same_image' not in found
    assert (folder / 'run' / 'results.json').read_text() == own


def test_a_student_may_begin_as_another_one_and_a_new_key_makes_no_other_training(whole):
    words = 'run.folder=further', 'release=run/mask/reconstructed', 'fr.epochs=1'
    assert 'training further/fr.pt' in run(whole, 'train_fr.py', 'fr.init=run/fr.pt', *words)
    student = whole / 'run' / 'fr.pt'
    state = torch.load(student, weights_only=True)                   # from before a key was
    del state['made_from']['fr.sample_rate']
    torch.save(state, student)
    assert 'nothing to do' in run(whole, 'train_fr.py', 'fr.shard_classes=true')
    printed = run(whole, 'train_fr.py', 'fr.sample_rate=0.5', code=2)
    assert 'sample_rate (1.0 then, 0.5 now)' in printed


def test_half_of_a_clusters_environment_and_too_few_gpus_are_a_sentence(monkeypatch):
    cfg = SimpleNamespace(run=SimpleNamespace(device='auto'))
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(InputError, match='with torchrun, or unset WORLD_SIZE'):
        process.start_processes(cfg)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(InputError, match='no GPU of its own'):
        process.choose_device(cfg)


def test_the_whole_experiment_is_checked_in_seconds_before_the_first_stage(finished, monkeypatch):
    told = run(finished[0], 'evaluate.py', '--check', '--compare')
    assert 'releases 10 of 24 people' in told and 'to train' not in told
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob('*')}
    monkeypatch.chdir(finished[0])
    for words, sentence in (
            ('evaluate.sets=[nowhere.bin]', 'nowhere.bin is neither there .* relative to /'),
            ('fr.batch=400', 'fr.batch = 400'), ('data.root=no/faces', 'does not exist'),
            ('teacher.checkpoint=no.pt', 'no.pt'), ('data.exclude=[999]', '999'),
            ('evaluate.attacks=[psychic]', 'psychic.*pixels'),
            ('mae.heads=5', 'does not divide by 5'), ('data.validation=0.01', 'held back')):
        with pytest.raises(InputError, match=sentence):
            check_experiment(namespace(resolve(TINY, [words])), compare=False)
    assert before == {p: p.stat().st_mtime_ns for p in finished[0].rglob('*')}


def test_what_is_left_to_train_is_told_before_faces_are_drawn(finished, tmp_path, monkeypatch):
    told = run(tmp_path, 'evaluate.py', '--check', '--compare')
    assert 'releases 10 of 24 people' in told and re.search(
        r'6 nets to train, about \d+ minutes? in one process', told)
    monkeypatch.chdir(finished[0])
    cfg = namespace(resolve(TINY, ['run.folder=run']))
    folds, rows = split(cfg), variants(cfg, compare=True)
    monkeypatch.setattr(Path, 'exists', lambda path: False)
    for path, (section, seen) in remaining(folds, rows).items():
        batch = cfg.mae.batch if section == 'mae' else cfg.fr.batch
        assert seen == torch.load(path, weights_only=True)['steps'] * batch


def test_a_damaged_checkpoint_or_one_of_another_teacher_is_one_sentence(copied):
    run(copied, 'train_mae.py', 'mae.epochs=3')
    path = copied / 'run' / 'fold0' / 'mae.pt'
    whole = torch.load(path, weights_only=True)
    config = whole['config']
    for damage in ({'optimizer': {}}, {'step': -1}, {'made_from': 3}, {'sums': torch.ones(7)}):
        torch.save({**whole, 'step': 5, **damage}, path)
        printed = run(copied, 'train_mae.py', 'mae.epochs=3', code=2)
        assert 'Traceback' not in printed and 'error: ' in printed, damage
    cfg = namespace(config)
    claims = [{'config': config | {'mae': config['mae'] | claim}} for claim in (
        {'depth': 'x'}, {'heads': 0}, {'depth': 1 << 10, 'dim': 1 << 14}, {'dim': 30})]
    for damage in ({'model': {'a': {'b': torch.ones(1)}}}, {'mean': torch.ones(2, 2)},
                   {'std': -1.0}, {'config': {}}, {'step': 'a'}, *claims):
        torch.save(whole | damage, path)
        words = 'damaged config|does not fit' if damage in claims else None
        with pytest.raises(InputError, match=words):
            protect.load_mae(path, cfg, torch.device('cpu'), '')
    torch.save(whole, path)
    teacher = torch.load(path.with_name('teacher.pt'), weights_only=True)
    teacher['net']['fc.bias'] += 0.1
    torch.save(teacher, path.with_name('teacher.pt'))
    assert 'another teacher' in run(copied, 'train_mae.py', 'mae.epochs=3', code=2)


def test_a_batch_that_does_not_divide_is_refused_before_any_work(copied, monkeypatch):
    monkeypatch.setattr(process, 'world', lambda: 5)
    monkeypatch.setattr(train_mae, 'load_teacher', lambda *_: 1 / 0)
    cfg = namespace(resolve(TINY, ['run.folder=run']))
    with pytest.raises(InputError, match='mae.batch = 24 does not divide by 5'):
        train_mae.train(variants(cfg, False)[0], SimpleNamespace(k=0), torch.device('cpu'))


def test_a_change_of_the_plots_discards_no_attack_and_a_change_of_the_attacks_does(monkeypatch):
    read, before = Path.read_bytes, attacks.code_digest()

    def changed(name):
        monkeypatch.setattr(Path, 'read_bytes', lambda path: read(path) + (
            b'#' if path.name == name else b''))
        return attacks.code_digest() != before

    assert not any(map(changed, ('pictures.py', 'tables.py', 'page.py')))
    assert all(map(changed, ('attacks.py', 'protect.py', 'models.py', 'published.py')))


@pytest.mark.long
def test_ones_own_faces_end_with_utility_and_leakage(tmp_path):
    """The README's command on a folder of drawn people, at the size of the tests."""
    for person in range(36):
        folder = tmp_path / 'faces' / f'person {person}'
        folder.mkdir(parents=True)
        for i, image in enumerate(toy.draw(np.full(6, person), np.arange(6), 40)):
            (folder / f'{i}.JPG').write_bytes(images.encode(image))
    small = [f'{section}.{key}={value}' for section, keys in yaml.safe_load(
        TINY.read_text()).items() if section in ('teacher', 'judge', 'mae', 'irm', 'fr')
        for key, value in keys.items()]
    done = subprocess.run(
        ['bash', ROOT / 'reproduce.sh', 'configs/own.yaml', f'data.root={tmp_path}/faces',
         f'run.folder={tmp_path}/own', 'data.size=32', 'run.threads=1', 'evaluate.attack_steps=3',
         *small], capture_output=True, text=True,
        env=os.environ | ENVIRONMENT | {'PYTHON': sys.executable}, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r'releases \d+ of 36 people', done.stdout)
    results = json.loads((tmp_path / 'own' / 'results.json').read_text())
    assert results['verification']['held back']['pairs'] == 6000
    assert 'insider_same_person' in results['privacy']
    assert 'report.html' in done.stdout.splitlines()[-1]
    assert all(len(line) <= 100 for line in done.stdout.splitlines()
               if str(tmp_path) not in line)
