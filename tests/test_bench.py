"""bench.py has a row for everything, and both sides of a ratio compute the same."""
import json
import math

import numpy as np
import pytest
import torch

import bench
import memory
import models
from conftest import TINY
from facekit import protect, run, verification
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


@pytest.mark.parametrize('make_pass', [memory.mae_pass, memory.recogniser_pass])
def test_the_memory_that_is_counted_without_a_gpu_is_what_a_pass_keeps(make_pass):
    """Beside the same pass with real tensors on the CPU, in float32, where types are alike."""
    cfg = namespace(resolve(TINY, ['data.size=48']))

    def nets():
        fr = models.iresnet(10, 16, 48, 32).to(memory_format=torch.channels_last)
        return ([protect.build_mae(cfg.mae, 48), models.folded(fr)]
                if make_pass is memory.mae_pass else [fr, models.MarginHead(32, 50)])

    with torch.device('meta'):
        fixed, image = memory.count(cfg, make_pass, nets(), floats=2)
    real = nets()
    weights = [x for net in real for x in (*net.parameters(), *net.buffers())]
    trained = sum(x.nbytes for x in weights if x.requires_grad)
    kept = memory.kept_bytes(make_pass(cfg, *real), weights, 64, 48)
    assert fixed + 64 * image == pytest.approx(kept + 3 * trained, rel=0.01)
    assert 64 * image > 0.5 * kept                              # or weights alone would be compared
