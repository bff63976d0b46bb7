"""A run that is stopped, killed, short of disk space or of a process ends like an undisturbed one.

Moments and sizes are random, but seeded; `pytest -m long` tries many more of them, and all stages.
"""
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, Script, log_lines, run, tensors, together, torchrun
from facekit.nets import training

ROWS = ['--compare', 'compare={mask: [reconstruct.method=mask]}']
RELEASES = ['run/reconstructed', 'run/release.json', 'run/mask/reconstructed',
            'run/mask/release.json']
# The command of a stage, what it finds of the finished experiment, and its main file. Each looks
# at its sets first. `faces` finds nothing at all: it draws people, many enough for a kill to fall
# into the drawing, and takes one step.
STAGES = {
    'faces': (['train_fr.py', 'stage=teacher', 'teacher.epochs=1e-6', 'toy.identities=120'],
              [], 'faces/train.rec'),
    'teacher': (['train_fr.py', 'stage=teacher'], ['faces'], 'run/fold0/teacher.pt'),
    'mae': (['train_mae.py'], ['faces', 'run/fold0/teacher.pt'], 'run/fold0/mae.pt'),
    'reconstruct': (['reconstruct.py', *ROWS], ['faces', 'run/fold0/mae.pt', 'run/release.key'],
                    'run/reconstructed/train.rec'),
    'student': (['train_fr.py', *ROWS], RELEASES, 'run/fr.pt'),
    'evaluate': (['evaluate.py', 'evaluate.attacks=[judge, trained]'],
                 ['faces', 'run/fold0', 'run/fr.pt', 'run/release.key', *RELEASES],
                 'run/results.json'),
    'compare': (['evaluate.py', *ROWS], ['faces', 'run/fold0', 'run/fr.pt', 'run/mask/fr.pt',
                                         'run/release.key', *RELEASES], 'run/table.txt')}
DRAFT = re.compile(r'\.(tmp|part|parts)(/|$)')
CHANGING = {'images_per_second', 'seconds', 'memory_gib'}
LONG = pytest.mark.long


def unchanging(text):
    """What JSON says, without what differs from run to run."""
    return json.loads(text, object_hook=lambda found: {
        k: v for k, v in found.items() if k not in CHANGING})


def content(path):
    """What a file says, so that two can be compared; raises where it is damaged."""
    if path.suffix == '.pt':
        state = torch.load(path, weights_only=True)
        return {'step': state['step'], 'logged': state['logged'],
                **{k: t.numpy().tobytes() for k, t in tensors(state).items()}}
    if path.suffix == '.jsonl':          # a set that was looked at before is not looked at again
        lines = [unchanging(line) for line in path.read_text().splitlines()]
        return [x for x in lines if not x['stage'].startswith('look')]
    if path.suffix == '.npz':            # without the times of the source's files
        look = np.load(path)
        return look['hashes'].tolist(), look['skipped'].tolist()
    if path.suffix == '.html':           # without the wall times
        return re.sub('<h2>(Made with|Seconds).*?</table>', '', path.read_text(), flags=re.DOTALL)
    return unchanging(path.read_text()) if path.suffix == '.json' else path.read_bytes()


class Stage:
    """A stage to be disturbed in its folder, and what it makes when it is not."""

    def __init__(self, name, source, folder):
        self.name, self.source, self.folder = name, source, folder / 'work'
        self.command, self.finds, self.main = STAGES[name]
        self.folder.mkdir()
        self.renew()
        begin = time.time()
        run(self.folder, *self.command, 'run.save_minutes=0')
        self.seconds, self.result = time.time() - begin, self.contents()
        self.sizes = {name: (self.folder / name).stat().st_size for name in self.result}

    def renew(self):
        """Bring the folder into the state before the stage."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for old, new in ((self.source / p, self.folder / p) for p in self.finds):
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(old, new) if old.is_dir() else shutil.copy2(old, new)

    def start(self, **how):
        return Script(self.folder, *self.command, 'run.save_minutes=0', **how).begin()

    def contents(self):
        """All files that a reader would take for whole, by name."""
        files = {str(p.relative_to(self.folder)): p for p in self.folder.rglob('*') if p.is_file()}
        said = {name: content(p) for name, p in files.items() if not DRAFT.search(name)}
        return {name: found for name, found in said.items() if found != []}  # log of a look alone

    def check_middle(self):
        """What is there is as it shall be; a checkpoint may be of any step, which is returned."""
        found = self.contents()
        for name, now in found.items():
            if name.endswith('results.json'):     # of the attacks until now
                some = {key: now.pop(key, {}) for key in ('attacked', 'privacy')}
                assert now.items() <= self.result[name].items()
                assert all(v.items() <= self.result[name][key].items() for key, v in some.items())
            elif not re.search(r'\.pt$|\.jsonl$|figures/mae|most_linked', name):
                assert now == self.result[name], name
        return found.get(self.main, {}).get('step', 0) if self.main[-3:] == '.pt' else 0

    def check_end(self):
        found = self.contents()
        assert found.keys() == self.result.keys()
        assert [name for name in found if found[name] != self.result[name]] == []
        assert [p for p in self.folder.rglob('*') if DRAFT.search(str(p))] == []

    def finish(self):
        run(self.folder, *self.command, 'run.save_minutes=0')
        self.check_end()

    def disturb(self, signals):
        """Send each of the signals at random moments until it hits the running stage."""
        chance, signals = random.Random(self.name), [*signals]
        self.renew()
        while signals:
            script = self.start()
            time.sleep(chance.uniform(0, self.seconds))
            script.send(signals[-1])
            code = script.wait(5)                            # seconds to save and to leave
            if code == 0:                                    # it was faster
                self.check_end()
                self.renew()
                self.seconds /= 1.5
                continue
            sent = signals.pop()
            assert code == -sent or sent != signal.SIGKILL and code in (130, 143), script.err
            assert 'Traceback' not in script.err, script.err
            self.check_middle()
        self.finish()


# A recogniser's training is the MAE's, but for its steps
@pytest.fixture(scope='module', params=[
    pytest.param(name, marks=LONG if name in ('teacher', 'student', 'compare') else ())
    for name in STAGES])
def stage(request, finished, tmp_path_factory):
    return Stage(request.param, finished[0], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize('signals', [
    [signal.SIGTERM, signal.SIGKILL], pytest.param([signal.SIGKILL] * 25, marks=LONG),
    pytest.param([signal.SIGTERM, signal.SIGINT] * 8, marks=LONG)])
def test_a_stage_that_is_killed_or_stopped_ends_like_an_undisturbed_one(stage, signals):
    """Who is asked to stop leaves within seconds."""
    stage.disturb(signals)


def test_a_file_that_cannot_grow_is_one_sentence(stage):
    """No file may become as long as the main one: what was there before stays whole."""
    stage.renew()
    script = stage.start(largest=stage.sizes[stage.main] - 1)
    assert script.wait(30) == 2, script.out + script.err
    assert re.fullmatch(r'error: .*space.* the same command again.*\n', script.err), script.err
    stage.check_middle()
    stage.finish()


# ------------------------------------------------------------------------ steps, processes

def reach(path, step):
    """Wait until the checkpoint of a training is of this step or a later one; which."""
    end = time.time() + 60
    while not path.exists() or torch.load(path, weights_only=True)['step'] < step:
        assert time.time() < end, f'{path} does not reach step {step}'
        time.sleep(0.005)
    return torch.load(path, weights_only=True)['step']


@pytest.mark.parametrize('arguments, line, result', [
    (['train_mae.py', 'mae.epochs=12'], 'train_mae/fold0/mae', 'fold0/mae.pt'),
    (['train_fr.py', 'run.row=mask', 'fr.epochs=9'], 'student/mask', 'mask/fr.pt')])
@pytest.mark.parametrize('asked', [
    signal.SIGUSR1, *(pytest.param(number, marks=LONG) for number in (
        signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2))])
def test_steps_in_pieces_are_the_same_steps(copied, arguments, line, result, asked):
    """Bit for bit; and who is asked to stop saves, even if a checkpoint is not yet due."""
    path, log = copied / 'run' / result, copied / 'run' / 'log' / f'{line}.jsonl'
    path.unlink(missing_ok=True)
    run(copied, *arguments)
    undisturbed = content(path), log_lines(copied, line)
    path.unlink()
    log.unlink()
    script = Script(copied, *arguments)
    while not log.exists() or not log.read_text():
        time.sleep(0.005)
    script.send(asked)
    assert script.wait(30) == 130 and 'the same command continues from' in script.out
    step, script = reach(path, 1), Script(copied, *arguments, 'run.save_minutes=0')
    reach(path, step + 3)
    script.send(signal.SIGKILL)
    assert script.wait() == -signal.SIGKILL
    assert 'continuing at step' in run(copied, *arguments)
    assert (content(path), log_lines(copied, line)) == undisturbed


@pytest.mark.parametrize('arguments, line, result, counts', [
    pytest.param(['train_mae.py', 'mae.batch=12', 'mae.epochs=9'], 'train_mae/fold0/mae',
                 'fold0/mae.pt', (2, 1, 3), marks=LONG),
    (['train_fr.py', 'run.row=mask', 'fr.batch=24', 'fr.norm_batch=4', 'fr.epochs=17',
      'fr.lr=1e-5', 'fr.shard_classes=true', 'fr.sample_rate=0.5'], 'student/mask', 'mask/fr.pt',
     (3, 1, 2))])         # at a usual lr this net amplifies the rounding of three sums
def test_processes_may_be_more_or_less_after_an_interruption(copied, arguments, line, result,
                                                             counts):
    """The same steps and schedule to the last digit, the same losses up to rounding."""
    arguments = [*arguments, 'run.save_minutes=0']
    path = copied / 'run' / result
    path.unlink(missing_ok=True)
    run(copied, *arguments)
    undisturbed, whole = log_lines(copied, line), tensors(torch.load(path, weights_only=True))
    path.unlink()
    for processes, step in zip(counts, (7, 19, None)):
        scripts = together(copied, *arguments, count=processes)
        if step:
            reach(path, step)
            scripts[-1].send(signal.SIGTERM)               # one process tells the other
        for one in scripts:
            assert one.wait() == (130 if step else 0), one.out + one.err
            assert 'Traceback' not in one.err
    for name in undisturbed[0].keys() - {'stage'}:
        # None is what does not act yet
        a, b = ([np.nan if x[name] is None else x[name] for x in lines]
                for lines in (undisturbed, log_lines(copied, line)))
        rounding = 1e-4 if name in ('mse', 'irm', 'relations', 'loss', 'accuracy') else 0
        # A correlation is near 0 in some batches, where a share of it says nothing
        atol = 1e-5 if name == 'relations' else 0
        np.testing.assert_allclose(a, b, rtol=rounding, atol=atol, err_msg=name)
    saved = tensors(torch.load(path, weights_only=True))
    assert saved.keys() == whole.keys()
    if 'fr.shard_classes=true' in arguments:              # divided twice, whole once
        for name in (n for n in whole if whole[n].shape == whole['head/weight/'].shape):
            error = (saved[name] - whole[name]).abs().max() / whole[name].abs().max()
            assert error < 5e-3, (name, error)            # rounding grows with the steps


IN_PARTS = """
import os, pathlib, signal, time, reconstruct
from facekit.base.launch import launch
reconstruct.PART = 8
real = reconstruct.make_part

def make_part(number, *others):
    if str(number) == os.environ.get('DIES_AT'):
        os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path('begun').touch()
    time.sleep(float(os.environ.get('SLOW', 0)))
    return real(number, *others)

reconstruct.make_part = make_part
launch(reconstruct.main)
"""


@pytest.fixture
def unreleased(whole):
    """A copy of the finished experiment without its release, and parts.py, which makes that."""
    shutil.rmtree(whole / 'run' / 'reconstructed')
    (whole / 'parts.py').write_text(IN_PARTS)
    return whole


def test_an_interrupted_release_is_made_anew_with_any_number_of_processes(unreleased, finished):
    """To the same bytes; nothing half is left where the release shall be."""
    script, release = unreleased / 'parts.py', unreleased / 'run' / 'reconstructed'
    scripts = together(unreleased, script, DIES_AT='6')
    assert {one.wait() for one in scripts} == {-signal.SIGKILL, 2}
    assert not release.exists()
    scripts = together(unreleased, script)
    assert [one.wait() for one in scripts] == [0, 0], scripts[0].err + scripts[1].err
    assert {path.name: path.read_bytes() for path in release.iterdir()} == {
        path.name: path.read_bytes() for path in (finished[0] / 'run/reconstructed').iterdir()}
    assert not list(release.parent.glob('*.tmp'))


@pytest.mark.parametrize('dies', [1, pytest.param(0, marks=LONG)])
def test_when_a_process_dies_the_others_say_so_and_end(copied, dies):
    scripts = together(copied, 'train_mae.py', 'mae.epochs=100000', 'run.save_minutes=0')
    reach(copied / 'run' / 'fold0' / 'mae.pt', 3)
    scripts[dies].send(signal.SIGKILL)
    assert scripts[dies].wait() == -signal.SIGKILL
    other = scripts[1 - dies]
    assert other.wait(60) == 2 and 'Traceback' not in other.err, other.err
    assert re.search('^error: .*another process', other.err, re.MULTILINE), other.err


def test_weights_that_exploded_do_not_replace_the_last_good_ones(copied, monkeypatch):
    """A finite loss can have a gradient whose update is not; it used to be saved."""
    real = training.Training.update

    def update(self, losses, lr):
        if self.step == 3:
            self.optimizer.param_groups[0]['params'][0].grad.fill_(float('inf'))
        real(self, losses, lr)

    monkeypatch.setattr(training.Training, 'update', update)
    assert 'a weight of model became' in run(copied, 'train_mae.py', 'run.save_minutes=0', code=2)
    state = torch.load(copied / 'run' / 'fold0' / 'mae.pt', weights_only=True)
    assert state['step'] == 3 and all(t.isfinite().all() for t in state['model'].values())


# -------------------------------------------------------------------- two starts of one thing

def test_a_second_start_waits_for_the_first_and_finds_its_work_done(copied):
    arguments = 'train_mae.py', 'run.save_minutes=0', 'mae.epochs=20'
    first = Script(copied, *arguments)
    reach(copied / 'run' / 'fold0' / 'mae.pt', 2)
    second = Script(copied, *arguments)
    assert first.wait() == 0 and second.wait() == 0
    assert 'another run is making' in second.out and 'nothing to do' in second.out


def test_another_method_in_the_folder_of_a_release_never_mixes_with_it(unreleased):
    """A held-up run's part used to end in the other one's release: originals in a masked set."""
    first = Script(unreleased, unreleased / 'parts.py', 'reconstruct.method=none', SLOW='0.4')
    while not (unreleased / 'begun').exists():
        time.sleep(0.01)
    words = 'reconstruct.py', 'reconstruct.method=mask'
    second = Script(unreleased, *words)
    assert first.wait(60) == 0
    assert second.wait() == 2 and 'another run is making' in second.out
    assert 'another reconstruct.method' in second.err
    release = unreleased / 'run' / 'reconstructed'
    assert json.loads((release / 'manifest.json').read_text())['method'] == 'none'
    # What is no release of this kit stays where it is
    (release / 'manifest.json').unlink()
    assert 'is no release of this kit' in run(unreleased, *words, code=2)
    assert (release / 'train.rec').exists()


def test_two_rows_are_evaluated_side_by_side(whole):
    rows = 'mask', 'originals'
    for row in rows:
        (whole / 'run' / row / 'results.json').unlink()
    scripts = [Script(whole, 'evaluate.py', f'run.row={row}', 'evaluate.attacks=[pixels]')
               for row in rows]
    assert [script.wait() for script in scripts] == [0, 0]
    for row in rows:
        assert (whole / 'run' / row / 'results.json').exists()
        assert (whole / 'run' / 'figures' / f'{row}_roc.png').exists()


@LONG
def test_ranks_that_outlive_their_launcher_are_noticed_by_the_next_start(copied):
    """SIGKILL of torchrun leaves its ranks training."""
    endless = 'mae.epochs=100000', 'run.save_minutes=0'
    launcher = torchrun(copied, ROOT / 'train_mae.py', *endless)
    reach(copied / 'run' / 'fold0' / 'mae.pt', 1)
    children = f'/proc/{launcher.pid}/task/{launcher.pid}/children'
    [rank] = [int(pid) for pid in Path(children).read_text().split()]
    launcher.kill()
    second = Script(copied, 'train_mae.py', *endless)
    time.sleep(6)
    second.send(signal.SIGKILL)
    os.kill(rank, signal.SIGKILL)
    launcher.communicate()
    second.wait()
    assert 'another run is making' in second.out and 'training' not in second.out
