"""What tests of the scripts share: running them, the finished tiny experiment, reading results.

What is neither disturbed nor one of several processes runs in the tests' own process. For the
rest, a fork of a process that has imported torch becomes a script in a tenth of a second.
"""
import contextlib
import io
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / 'tests' / 'tiny.yaml'
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]       # tests run from anywhere and find the kit
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
# Without GIT_DIR a commit during the tests would change what a release says about its maker
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'GIT_DIR': os.devnull}
# Before torch is imported: nets so small only wait for more threads
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['torch.distributed', 'torch._dynamo', 'torchvision.transforms.v2',
                              'rich.progress', 'rich.table', 'matplotlib.pyplot', 'einops', 'yaml',
                              'pytest'])


def become(folder, arguments, environment, largest, out, err, begun):
    """In the fork: what `python arguments` in `folder` would be."""
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))       # of the kit, or of a changed copy
    from facekit.base import launch
    start = launch.start_processes

    def announced(cfg):
        begun.send_bytes(b'.')
        return start(cfg)

    launch.start_processes = announced
    if largest is not None:         # bytes of a file: as on a full disk, the rest is not written
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        runpy.run_path(arguments[0], run_name='__main__')
    finally:                        # the rest is multiprocessing's, which a Ctrl-C would upset
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Script:
    """A script that runs in `folder` on the tiny config."""

    def __init__(self, folder, script, *assignments, largest=None, **environment):
        readers, writers = zip(*(FORKS.Pipe(duplex=False) for _ in range(3)))
        self.pipes, self.begun, self.text = readers[:2], readers[2], [b'', b'']
        self.process = FORKS.Process(target=become, daemon=True, args=(
            folder, [str(ROOT / script), '--config', str(TINY), 'run.folder=run', *assignments],
            ENVIRONMENT | environment, largest, *writers))
        self.process.start()
        for pipe in writers:
            pipe.close()

    def begin(self):
        """Wait until Python's imports are over and the script works."""
        self.begun.poll(100)
        return self

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):             # it was faster
            os.kill(self.process.pid, number)

    def wait(self, seconds=200):
        """Exit code; minus the signal's number where one ended the process."""
        end, waiting = time.time() + seconds, list(self.pipes)
        while waiting:
            ready = connection.wait(waiting, max(0, end - time.time()))
            if not ready:
                self.process.kill()
                pytest.fail(f'still runs after {seconds} s: {self.text}')
            for pipe in ready:
                read = os.read(pipe.fileno(), 1 << 16)
                self.text[self.pipes.index(pipe)] += read
                if not read:
                    waiting.remove(pipe)
        self.process.join()
        self.out, self.err = (text.decode() for text in self.text)
        return self.process.exitcode


def run(folder, script, *assignments, processes=1, code=0):
    """Run a script in `folder` to its end; returns what it printed."""
    if processes > 1:
        ended = together(folder, script, *assignments, count=processes)
        assert [one.wait() for one in ended] == [code] * processes, [one.err for one in ended]
        return ''.join(one.out + one.err for one in ended)
    import torch
    said, ended = io.StringIO(), None
    argv = [str(ROOT / script), '--config', str(TINY), 'run.folder=run', *assignments]
    before, threads = [*map(signal.getsignal, STOPS)], torch.get_num_threads()
    try:
        with (contextlib.chdir(folder), contextlib.redirect_stdout(said),
              contextlib.redirect_stderr(said), mock.patch.dict(os.environ, ENVIRONMENT),
              mock.patch.object(sys, 'argv', argv), pytest.raises(SystemExit) as ended):
            runpy.run_path(argv[0], run_name='__main__')
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        for number, handler in zip(STOPS, before):
            signal.signal(number, handler)
    assert (ended.value.code or 0) == code, said.getvalue()[-5000:]
    return said.getvalue()


def free_port():
    """Number of a port of this machine that nothing uses."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def together(folder, *arguments, count=2, largest=None, **environment):
    """The processes of a run, of which the later ones cannot write one byte into any file."""
    port = str(free_port())
    return [Script(folder, *arguments, largest=limit, RANK=rank, LOCAL_RANK=rank,
                   WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=port, **environment)
            for rank, limit in zip('0123'[:count], (largest, 0, 0, 0))]


def torchrun(folder, script, *assignments, options=('--standalone', '--nproc_per_node=1')):
    """torchrun with a script in `folder` on the tiny config, running; printed together."""
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', *options, str(script), '--config',
         str(TINY), 'run.folder=run', *assignments], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | ENVIRONMENT)


def in_processes(function, count, *arguments):
    """Let function(rank, *arguments) run in `count` processes, all of which shall end well."""
    every = [FORKS.Process(target=function, args=(rank, *arguments)) for rank in range(count)]
    for one in every:
        one.start()
    for one in every:
        one.join(300)
        one.kill()                     # who waits for one that failed
    assert [one.exitcode for one in every] == [0] * count


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    """A folder with all that reproduce.sh runs of the tiny experiment, and what it printed."""
    folder = tmp_path_factory.mktemp('pipeline')
    commands = subprocess.run(['bash', ROOT / 'reproduce.sh', TINY], text=True, check=True,
                              env=os.environ | {'PYTHON': 'echo'}, stdout=subprocess.PIPE).stdout
    printed = [run(folder, script, *words) for script, _, *words in map(
        str.split, commands.splitlines())]
    return folder, ''.join(printed)


@pytest.fixture
def whole(finished, tmp_path):
    """The same folder to work on."""
    return shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)


@pytest.fixture
def copied(whole):
    """The same without what stages 1 to 4 made."""
    for name in ('fold0/mae.pt', 'fr.pt', 'results.json'):
        (whole / 'run' / name).unlink()
    for name in ('reconstructed', 'log'):
        shutil.rmtree(whole / 'run' / name)
    return whole


def tensors(state):
    """Every tensor of a nested checkpoint by its path."""
    import torch  # late: the forks' parent reads this file, too
    if torch.is_tensor(state):
        return {'': state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(
        state, list) else []
    return {f'{k}/{name}': t for k, v in items for name, t in tensors(v).items()}


def figures(path):
    """{place: value} of everything in a JSON file of results but how it was made."""
    def flat(place, value):
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return {place: value}
        return {k: v for name, x in value.items()
                if name not in ('seconds', 'made_with', 'config', 'attacked')
                for k, v in flat(f'{place}/{name}', x).items()}

    return flat('', json.loads(path.read_text()))


def differing(one, two):
    """{place: (value, value)} where two figures() do not agree."""
    assert one.keys() == two.keys() and len(one) > 100
    return {place: (value, two[place]) for place, value in one.items() if value != two[place]}


def log_lines(folder, stage, drop=('images_per_second', 'seconds', 'memory_gib')):
    path = folder / 'run' / 'log' / f'{stage}.jsonl'
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    assert {x['stage'] for x in lines} <= {stage}
    return [{k: v for k, v in x.items() if k not in drop} for x in lines]
