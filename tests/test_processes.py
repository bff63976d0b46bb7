"""Several processes: what they give together, what one does alone, and how a failure ends them."""
import time

import numpy as np
import pytest

from conftest import ROOT, differing, figures, free_port, run, torchrun
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


def test_two_processes_compare_as_one_does(finished, whole):
    """All attacks, tables and pictures; what rank 0 does alone waits for nobody."""
    made = ['comparison.json', 'table.txt', 'report.html', 'results.json', 'roc.png',
            'tradeoff.png', 'release_most_linked.png', 'mask_most_linked.png']
    before = set(whole.rglob('*'))
    for path in [p for name in made for p in (whole / 'run').rglob(name)]:
        path.unlink()
    run(whole, 'evaluate.py', '--compare', processes=2)
    one, two = (figures(folder / 'run' / 'comparison.json') for folder in (finished[0], whole))
    assert differing(one, two) == {}
    assert before <= set(whole.rglob('*'))
    assert (whole / 'run' / 'table.txt').read_text() == (
        finished[0] / 'run' / 'table.txt').read_text()


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
    port = free_port()
    nodes = [torchrun(copied, ROOT / 'train_fr.py', 'run.folder=two', *arguments, options=(
        '--nnodes=2', f'--node_rank={number}', '--nproc_per_node=1', '--master_addr=127.0.0.1',
        f'--master_port={port}')) for number in range(2)]
    printed = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    run(copied, 'train_fr.py', 'run.folder=one', *arguments)
    one, two = ([entry['loss'] for _, entry in read_log(
        copied / name / 'log/teacher/fold0.jsonl')] for name in ('one', 'two'))
    np.testing.assert_allclose(one, two, rtol=1e-4)
