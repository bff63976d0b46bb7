"""bench.py has a row for everything, and both sides of a ratio compute the same."""
import json
import math

import numpy as np
import pytest
import torch

import bench
from conftest import TINY
from facekit import run, verification
from facekit.config import namespace, resolve


@pytest.mark.parametrize('pairs', [600, 205])              # 205 do not divide into ten folds
def test_the_plain_loop_and_the_histogram_give_the_same_folds(pairs):
    rng = np.random.default_rng(0)
    same = np.resize(np.r_[np.ones(30, bool), np.zeros(30, bool)], pairs)
    distance = np.where(same, rng.normal(1, 0.4, pairs), rng.normal(1.8, 0.4, pairs)).clip(0, 4)
    np.testing.assert_array_equal(bench.loop_accuracies(distance, same),
                                  verification.fold_accuracies(distance, same))


def test_every_stage_is_measured_and_missing_peers_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, small in dict(RUNS=2, SECONDS=0.01, PAIRS=100, SEARCH=(32, 64), RECORDS=50,
                            INDEX=2000, LOADED=64).items():
        monkeypatch.setattr(bench, name, small)
    cfg = namespace(resolve(TINY, ['run.device=cpu']))
    threads = torch.get_num_threads()
    bench.main(str(tmp_path / 'nothing'), cfg, run.start_processes(cfg), False)
    torch.set_num_threads(threads)

    [path] = tmp_path.glob('results/speed/cpu-*-tiny.json')
    found = json.loads(path.read_text())
    assert {row['stage'] for row in found['rows']} == {
        '1 train', '2 reconstruct', '3 recognise', '4 evaluate', 'reading'}
    for row in found['rows']:
        values = [v for v in row.values() if not isinstance(v, str)]
        assert all(v > 0 and math.isfinite(v) for v in values), row
        assert row['ms_min'] <= row['ms'] <= row['ms_max']
    steps = [row for row in found['rows'] if row['what'].startswith('step')]
    assert len(steps) == 3 and all({'gflop', 'of_peak', 'data'} <= set(row) for row in steps)
    assert steps[1]['gflop'] > steps[0]['gflop']           # with relations, a teacher looks on
    said = capsys.readouterr().out
    assert all(f'{peer} is left out' in said for peer in
               ('facebookresearch/mae', 'facebookresearch/mae, insightface', 'insightface'))
