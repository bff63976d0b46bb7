"""bench.py has a row for everything, and the speed of a training is what its log says."""
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from conftest import TINY
from facekit.base import process
from facekit.base.config import namespace, resolve


def test_what_came_before_the_first_line_of_a_log_does_not_count():
    """Ten steps of 6 images a line, of which each but the first takes 0.5, 1 and 2 seconds."""
    seconds = np.array([30, 30.5, 31.5, 33.5])
    lines = [{'step': 10 * n, 'images_per_second': round(60 * n / seconds[n - 1], 4),
              'memory_gib': 1.0 * n} for n in range(1, 5)]
    speed = bench.log_speed(lines, 40.0, 6)
    assert speed.images_per_second == pytest.approx(180 / 3.5, rel=1e-3)
    assert speed.slowest == pytest.approx(30, rel=1e-3)
    assert speed.fastest == pytest.approx(120, rel=1e-2)
    assert (speed.seconds, speed.memory_gib) == (40.0, 4.0)


def test_every_stage_is_measured_and_missing_peers_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])          # where peers would be found
    threads = torch.get_num_threads()
    cfg = namespace(resolve(TINY, ['run.device=cpu']))
    own = SimpleNamespace(peers=str(tmp_path / 'nothing'), steps=8, command='as told')
    bench.main(own, cfg, process.start_processes(cfg), False)
    torch.set_num_threads(threads)

    [path] = tmp_path.glob('results/speed/cpu-*-tiny.json')
    found = json.loads(path.read_text())
    assert (found['command'], found['config']['mae']['batch']) == ('as told', 24)
    assert [row['stage'] for row in found['rows']] == [
        '0 teacher', '1 train', '1 train', '2 reconstruct', '3 recognise', '4 evaluate']
    for row in found['rows']:
        assert row['slowest'] <= row['images_per_second'] <= row['fastest'], row
        assert all(0 < row[key] and math.isfinite(row[key])
                   for key in ('slowest', 'fastest', 'seconds', 'memory_gib'))
    said = capsys.readouterr().out
    assert all(f'{peer} is left out' in said for peer in
               ('facebookresearch/mae', 'facebookresearch/mae, insightface', 'insightface'))
