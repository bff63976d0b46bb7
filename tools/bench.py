"""Speed of every stage on drawn faces, in a config's shapes, beside other people's code if asked.

    python tools/bench.py                              # the toy's shapes, a minute or two
    python tools/bench.py --config configs/casia.yaml  # a GPU; on a CPU with run.precision=fp32,
                                                       # --steps 12 and batches of 8 or 16
    python tools/bench.py --peers FOLDER               # beside other people's code, see peers.py

Writes  results/speed/<device>-<config>.json

The stages run as a user runs them, in a folder that is deleted. Each training makes --steps
steps (40), and its log tells its speed from the first line on, before which come set-up,
compilation and the choice of kernels; slowest and fastest are between two lines. A few batches of
people are drawn, so that a class layer of a million is not measured. Memory is the most that a
GPU allocated or, on a CPU, that the process held, with what earlier stages left.
"""
import argparse
import copy
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import peers
import reconstruct
import train_fr
import train_mae
from facekit.base import process
from facekit.base.config import as_dict, variants
from facekit.base.errors import InputError
from facekit.base.launch import launch, provenance
from facekit.base.log import read_log
from facekit.data.people import split

EPOCH = 3       # batches that the public and that the private images make, about


@dataclass
class Speed:
    """Images a second, and what else is known of a row."""
    images_per_second: float
    slowest: float
    fastest: float
    seconds: float | None = None             # of the whole stage
    memory_gib: float | None = None
    ratio: float | None = None               # of the kit's speed to this peer's


def log_speed(lines, seconds, batch):
    """Speed of a training by the lines of its log; batch: images a step."""
    images = np.array([line['step'] * batch for line in lines])
    # The seconds that the log has end at hundredths
    clock = images / np.array([line['images_per_second'] for line in lines])
    speeds = np.diff(images) / np.diff(clock)
    mean = (images[-1] - images[0]) / (clock[-1] - clock[0])
    return Speed(mean, speeds.min(), speeds.max(), seconds, lines[-1]['memory_gib'])


def changed(cfg, **sections):
    """A copy of a config: changed(cfg, mae={'batch': 64})."""
    cfg = copy.deepcopy(cfg)
    for section, values in sections.items():
        vars(getattr(cfg, section)).update(values)
    return cfg


def on_drawn_faces(cfg, folder):
    """The config on faces that will be drawn into a folder; half of the people are private."""
    faces = str(folder / 'faces')
    people = 2 * EPOCH * max(cfg.mae.batch, cfg.fr.batch) // 8
    teacher = cfg.teacher.checkpoint or str(folder / 'run' / 'fold0' / 'teacher.pt')
    return changed(
        cfg,
        run={'folder': str(folder / 'run'), 'save_minutes': 1e9},
        data={'root': faces, 'public': '', 'folds': 2,
              'release_folds': [0], 'validation': 0.0, 'exclude': [], 'min_images': 1},
        toy={'root': faces, 'identities': max(24, people), 'images': 8,
             'test_identities': 24, 'test_pairs': 200},
        teacher={'checkpoint': teacher},
        judge={'checkpoint': teacher},
        mae={'name': 'mae', 'init': ''},
        irm={'warmup_epochs': 0.0},
        reconstruct={'method': 'facemae', 'key': ''},
        fr={'init': ''},
        evaluate={'model': '', 'sets': [f'{faces}/toy.bin'], 'attacks': ['judge'], 'probes': 0})


class Bench:
    """A config on drawn faces, and the speeds of the stages that ran on them."""

    def __init__(self, cfg, device, folder, steps):
        self.device, self.folder, self.rows = device, folder, []
        self.trains_teacher = not cfg.teacher.checkpoint
        self.cfg = c = on_drawn_faces(cfg, folder)
        with peers.quiet():
            fold = split(c)[0]
        c.run.log_every = steps // 4
        c.teacher.epochs = steps / max(1, len(fold.train) // c.fr.batch)
        c.mae.epochs = steps / max(1, len(fold.mae) // c.mae.batch)
        c.fr.epochs = steps / max(1, len(fold.released) // c.fr.batch)

    def run(self, main, log, stage='student', folder='run', **changes):
        """The lines that main() of a stage logs, and the seconds that it takes; see changed()."""
        cfg = changed(self.cfg, **changes)
        cfg.stage, cfg.run.folder = stage, str(self.folder / folder)
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        with peers.quiet():
            main(cfg, self.device, False)
        seconds = time.perf_counter() - begin
        lines = read_log(self.folder / folder / 'log' / f'{log}.jsonl')
        return [line for _, line in lines], seconds

    def teacher(self, folder='run'):
        """Speed of a recogniser's training on public people."""
        log = self.run(train_fr.main, 'teacher/fold0', 'teacher', folder,
                       teacher={'checkpoint': ''})
        return log_speed(*log, self.cfg.fr.batch)

    def student(self):
        """Speed of a recogniser's training on the release."""
        return log_speed(*self.run(train_fr.main, 'student'), self.cfg.fr.batch)

    def mae(self, folder='run', name='mae'):
        """Speed of stage 1 with relations or, as `plain`, without."""
        weight = 0.0 if name == 'plain' else self.cfg.irm.weight or 1.0
        log = self.run(train_mae.main, f'train_mae/fold0/{name}', folder=folder,
                       mae={'name': name}, irm={'weight': weight})
        return log_speed(*log, self.cfg.mae.batch)

    def whole(self, main, log):
        """Speed of a stage that is no training, by its log's last line."""
        lines, seconds = self.run(main, log)
        speed = lines[-1]['images_per_second']
        return Speed(speed, speed, speed, seconds, lines[-1]['memory_gib'])

    def add(self, stage, what, speed):
        """Keep and say a Speed."""
        self.rows.append({'stage': stage, 'what': what} | asdict(speed))
        process.say(f'{stage}: {what}: {speed.images_per_second:,.1f} images/s')

    def add_turns(self, stage, what, speeds, kits):
        """Keep the speeds of several turns; kits: the kit's own in the same ones."""
        middle, ratio = float(np.median(speeds)), float(np.median(np.divide(kits, speeds)))
        self.add(stage, what, Speed(middle, min(speeds), max(speeds), ratio=ratio))


def measure(b):
    """Rows of all stages."""
    if b.trains_teacher:
        b.add('0 teacher', 'IResNet', b.teacher())
    b.add('1 train', 'MAE without relations', b.mae(name='plain'))
    b.add('1 train', 'MAE with relations', b.mae())
    b.add('2 reconstruct', 'the whole stage', b.whole(reconstruct.main, 'reconstruct'))
    b.add('3 recognise', 'IResNet', b.student())
    b.add('4 evaluate', 'attack of a judge', b.whole(evaluate.main, 'evaluate'))


def main(own, cfg, device, compare):
    """Measure, write the JSON and show the table; `own`: this script's arguments."""
    if process.world() > 1:
        raise InputError('bench.py measures one process: run it with python, not torchrun')
    if own.steps < 8:
        raise InputError(f'--steps {own.steps} is too few to measure: use 8 or more')
    found = {'command': own.command, 'threads': torch.get_num_threads(), 'config': as_dict(cfg),
             **provenance(device)}
    cfg = variants(cfg, False)[0].cfg               # with all values resolved
    if own.peers:                                   # which know no micro-batches
        cfg.mae.batch = min(cfg.mae.batch, cfg.mae.micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        b = Bench(cfg, device, Path(folder), own.steps)
        measure(b)
        if own.peers:
            peers.compare(b, Path(own.peers), own.steps)
    name = f'{found["device"]} {Path(cfg.run.config).stem}'.lower()
    path = Path('results/speed', re.sub('[^a-z0-9]+', '-', name) + '.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | {'rows': b.rows}, indent=1) + '\n')
    table = Table(*b.rows[0], title=f'{path.stem}, {cfg.run.precision}')
    for row in b.rows:
        table.add_row(*(f'{x:,.4g}' if isinstance(x, float) else x for x in row.values()))
    Console(width=120).print(table)
    process.say(path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--peers', default='')
    parser.add_argument('--steps', type=int, default=40)
    parser.set_defaults(command=' '.join(['python', *sys.argv]))
    arguments, sys.argv[1:] = parser.parse_known_args()
    launch(lambda *rest: main(arguments, *rest))
