"""Several processes: what they give together, what one does alone, and how a failure ends them."""
import json
import shutil
import socket
import time

import numpy as np
import pytest

from conftest import ROOT, run, torchrun
from facekit.base.log import read_log

TOGETHER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from facekit.base import process
from facekit.base.launch import launch


def main(cfg, device, compare):
    def alone():
        with process.only_writer('alone'):        # each of these would wait for the other process
            process.barrier()
            return process.broadcast(process.world()) + len(process.dealt(1, str))

    assert process.on_rank_0(alone) == 2 and process.world() == 2
    print('done alone', flush=True)
    if process.rank() == 1:
        raise KeyError('planted fault')
    process.barrier()


launch(main)
"""


def figures(folder):
    """All figures of comparison.json by their paths."""
    def flat(path, value):
        items = value.items() if isinstance(value, dict) else (
            enumerate(value) if isinstance(value, list) else None)
        return {path: value} if items is None else {
            k: v for name, x in items if name not in ('seconds', 'made_with', 'config')
            for k, v in flat(f'{path}/{name}', x).items()}

    return flat('', json.loads((folder / 'run' / 'comparison.json').read_text()))


def test_two_processes_compare_as_one_does(finished, tmp_path):
    """All attacks, tables and pictures; what rank 0 does alone waits for nobody."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    made = ['comparison.json', 'table.txt', 'report.html', 'results.json']
    for path in [p for name in made for p in (tmp_path / 'run').rglob(name)]:
        path.unlink()
    pictures = {p.name for p in (tmp_path / 'run/figures').iterdir()}
    for name in ('roc.png', 'tradeoff.png', 'release_most_linked.png', 'mask_most_linked.png'):
        (tmp_path / 'run/figures' / name).unlink()
    run(tmp_path, 'evaluate.py', '--compare', processes=2)
    one, two = figures(finished[0]), figures(tmp_path)
    assert one.keys() == two.keys() and len(one) > 500
    assert {name: (one[name], two[name]) for name in one if one[name] != two[name]} == {}
    assert pictures == {p.name for p in (tmp_path / 'run/figures').iterdir()}
    for name in made[:3]:
        assert (tmp_path / 'run' / name).stat().st_size > 1000


def test_what_rank_0_does_alone_waits_for_nobody_and_a_failure_ends_all(tmp_path):
    (tmp_path / 'together.py').write_text(TOGETHER)
    begin = time.time()
    launcher = torchrun(tmp_path, 'together.py', options=('--standalone', '--nproc_per_node=2'))
    printed = launcher.communicate(timeout=100)[0]
    assert printed.count('done alone') == 2, printed
    assert launcher.returncode and time.time() - begin < 60
    assert "KeyError: 'planted fault'" in printed


@pytest.mark.long
def test_two_nodes_train_what_one_does(copied):
    """Each node has its own launcher; both have the same folder."""
    arguments = 'stage=teacher', 'teacher.epochs=1', 'run.log_every=1'
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    nodes = [torchrun(copied, ROOT / 'train_fr.py', 'run.folder=two', *arguments, options=(
        '--nnodes=2', f'--node_rank={number}', '--nproc_per_node=1', '--master_addr=127.0.0.1',
        f'--master_port={port}')) for number in range(2)]
    printed = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    run(copied, 'train_fr.py', 'run.folder=one', *arguments)
    one, two = ([entry['loss'] for _, entry in read_log(
        copied / name / 'log/teacher/fold0.jsonl')] for name in ('one', 'two'))
    np.testing.assert_allclose(one, two, rtol=1e-4)
