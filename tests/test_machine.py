"""Systems, terminals and launchers that lack something: what was computed is kept, or a sentence
says what is missing."""
import contextlib
import ctypes
import errno
import io
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from conftest import ENVIRONMENT, ROOT, TINY, Script, run
from facekit.base import files, launch, machine, process
from facekit.base.errors import InputError, printable
from facekit.base.log import StageLog


def missing(*_, **__):
    raise OSError(errno.ENOSYS, 'Function not implemented')


# -------------------------------------------------------------------------- the operating system

def test_a_system_that_lacks_what_linux_has_gets_an_answer(monkeypatch):
    read = Path.read_text
    monkeypatch.delattr(os, 'sched_getaffinity')
    monkeypatch.setattr(Path, 'read_text', lambda path: (
        missing() if path.parts[1] in ('proc', 'sys') else read(path)))
    monkeypatch.setattr(ctypes, 'CDLL', missing)
    assert machine.cores() == os.cpu_count()
    assert machine.free_memory() == os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2
    machine.keep_large_buffers()
    held = machine.most_memory()
    monkeypatch.setattr(sys, 'platform', 'darwin')                  # which counts in bytes
    assert 1 << 24 < held < 1 << 40 and machine.most_memory() < held / 500


def test_a_file_system_without_locks_or_maps_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine.fcntl, 'flock', missing)
    with process.only_writer(tmp_path / 'mae.pt'):
        (tmp_path / 'mae.pt').write_bytes(b'weights')
    assert f'{tmp_path} cannot be locked' in capsys.readouterr().out
    monkeypatch.setattr(files.mmap, 'mmap', missing)
    assert files.open_bytes(tmp_path / 'mae.pt') == b'weights'


# ----------------------------------------------------------------------------------- the terminal

def test_a_screen_that_takes_nothing_costs_nothing(copied):
    """A full one, a closed one, and one that ends before the run."""
    started = {}
    for folder, screen in (('полон', '> /dev/full'), ('закрыт', '>&-'), ('конец', '2>&- | true')):
        command = (f'{sys.executable} {ROOT}/train_fr.py {TINY} stage=teacher run.folder={folder} '
                   f'teacher.epochs=0.2 {screen}')
        started[folder] = subprocess.Popen(
            ['bash', '-o', 'pipefail', '-c', command], cwd=copied, stderr=subprocess.PIPE,
            env=os.environ | ENVIRONMENT | {'PYTHONIOENCODING': 'ascii'})
    for folder, one in started.items():
        assert (one.communicate(timeout=100)[1], one.returncode) == (b'', 0), folder
        assert (copied / folder / 'fold0' / 'teacher.pt').exists()


@pytest.mark.parametrize('screen, code', [('> /dev/full', 2), ('| true', 2), ('| cat', 0)])
def test_help_that_cannot_be_written_is_no_traceback(screen, code):
    done = subprocess.run(['bash', '-o', 'pipefail', '-c', f'{sys.executable} evaluate.py --help '
                           f'{screen}'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and len(done.stderr.splitlines()) == bool(code)


def test_a_screen_in_ascii_shows_other_letters_escaped():
    shown = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    print('Анна', file=launch.Screen(shown))
    assert shown.buffer.getvalue() == b'\\u0410\\u043d\\u043d\\u0430\n'
    # And characters that a terminal obeys
    assert printable('a\x1b[31m\nb\udcff') == 'a\\x1b[31m\\nb\\udcff'


@pytest.mark.parametrize('stage, number, name', [
    ('student/mask', '5/6', '5/6 student/mask'), ('teacher/fold0', '', 'teacher/fold0'),
    ('train_mae/fold0/mae_with_a_name/seed1', '3/6', 'seed1')])
def test_a_line_of_the_log_is_whole_at_80_columns(tmp_path, monkeypatch, capsys, stage, number,
                                                  name):
    monkeypatch.setenv('STAGE', number)
    log = StageLog(tmp_path, stage, 113280)
    log.begin -= 20_000
    log(30_000, 15_360_000, loss=12.34567, accuracy=0.83149, margin=0.35, relations=None, lr=0.1)
    line = capsys.readouterr().out
    assert line.startswith(f'[{name}] 26 % 15:25:') and len(line) <= 80
    assert ' left 768 img/s loss 12.3 accuracy 83.1 %' in line


def test_ctrl_c_while_torch_is_imported_is_one_sentence(tmp_path):
    (tmp_path / 'torch.py').write_text('import os\nos.kill(os.getpid(), 2)\nraise ImportError\n')
    done = subprocess.run([sys.executable, ROOT / 'train_mae.py'], capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 130 and not done.stdout
    assert done.stderr.strip() == 'stopped before anything began; the same command begins again'


# ---------------------------------------------------------------------- launchers and compilers

def test_a_run_under_nohup_outlives_its_terminal(monkeypatch):
    answered = []
    monkeypatch.setattr(signal, 'getsignal', {signal.SIGHUP: signal.SIG_IGN}.get)
    monkeypatch.setattr(signal, 'signal', lambda number, action: answered.append(number))
    launch.on_ending_signals(launch.Stop.request)
    assert answered == [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def test_numbers_of_a_launcher_may_be_empty_and_are_refused_where_they_are_none(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '')
    assert process.on_this_node() == 1
    monkeypatch.setenv('WORLD_SIZE', '16')
    assert process.on_this_node() == 16
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')                 # threads and memory are a node's
    assert process.on_this_node() == 2
    monkeypatch.delenv('LOCAL_WORLD_SIZE')
    monkeypatch.setenv('WORLD_SIZE', 'two')
    with pytest.raises(InputError, match="WORLD_SIZE = 'two' in the environment is no number"):
        process.on_this_node()


def test_a_taken_port_is_a_sentence(tmp_path):
    with contextlib.closing(socket.create_server(('127.0.0.1', 0))) as taken:
        port = str(taken.getsockname()[1])
        script = Script(tmp_path, 'train_fr.py', RANK='0', LOCAL_RANK='0', WORLD_SIZE='2',
                        MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        assert script.wait(60) == 2
    assert f'error: port {port} is taken by another run' in script.err
    assert 'Traceback' not in script.err


@pytest.mark.parametrize('error, words', [
    (CppCompileError(['g++', 'x.cpp'], 'fatal error: Python.h: No such file'), 'headers of'),
    (InvalidCxxCompiler(), r'install a C\+\+ compiler and the headers of'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'a file below .*No space left'),
    (PermissionError(errno.EACCES, 'Permission denied', 'run/a.pt'), 'run/a.pt: .*: check path'),
    (RuntimeError('CUDA out of memory. Tried to allocate'), 'memory is too small')])
def test_what_the_system_lacks_is_a_sentence(error, words):
    assert re.search(words, launch.explanation(error, None))


# ----------------------------------------------------------------------------- folders and code

def test_reproduce_takes_paths_from_the_callers_folder(tmp_path):
    def commands(config):
        done = subprocess.run(['bash', ROOT / 'reproduce.sh', config], cwd=tmp_path, text=True,
                              env=os.environ | {'PYTHON': 'echo'}, capture_output=True)
        return [line.split()[:2] for line in done.stdout.splitlines()]

    (tmp_path / 'own.yaml').touch()
    assert commands('own.yaml')[1] == [f'{ROOT}/train_fr.py', 'own.yaml']
    assert commands('configs/toy.yaml')[6] == [f'{ROOT}/evaluate.py', f'{ROOT}/configs/toy.yaml']


def test_a_checkpoint_that_other_code_made_is_used_with_a_warning(finished, monkeypatch):
    path, read = finished[0] / 'run' / 'fold0' / 'mae.pt', Path.read_bytes
    before, made_by = read(path), torch.load(path, weights_only=True)['made_by']
    assert len(made_by['code']) == 64 and made_by['commit']
    assert 'other code' not in run(finished[0], 'train_mae.py')
    monkeypatch.setattr(Path, 'read_bytes', lambda path: read(path) + (
        b'#' if path.name == 'irm.py' else b''))
    printed = run(finished[0], 'train_mae.py')
    assert 'mae.pt was made by other code' in printed and 'nothing to do' in printed
    assert read(path) == before
