"""Speed of every stage: the kit's own steps on drawn data in a config's shapes, beside its peers.

    python tools/bench.py                              # the toy's shapes, minutes on any machine
    python tools/bench.py --config configs/casia.yaml  # a GPU; on the CPU with run.precision=fp32
                                                       # and small batches (mae.batch=16 ...)
    python tools/bench.py --peers FOLDER               # beside other people's code, see peers.py

Writes  results/speed/<device>-<config>.json

Training steps are those of train_mae.train and train_fr.train themselves. Times are medians (least
.. most) of a few blocks of half a second or one step; first_seconds is the first, with set-up,
compilation and the choice of kernels. Operations are those of matrix products, convolutions and
attention, two for a multiplication and an addition, those with a convolution's padding included;
of_peak is beside a large matrix product in run.precision, which a CPU's convolutions can exceed;
data is the share of a step that gathering its images takes. Memory is the most a GPU allocated
or, on the CPU, that the process held, with what earlier rows left.
"""
import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import loaders  # noqa: E402
import models  # noqa: E402
import train_fr  # noqa: E402
import train_mae  # noqa: E402
from facekit import batches, embed, faces, images, protect, records, retrieval, run  # noqa: E402
from facekit import toy, verification  # noqa: E402
from facekit.config import as_dict, variants  # noqa: E402
from facekit.errors import InputError  # noqa: E402
from facekit.faces import FaceSet, ImageRows  # noqa: E402
from facekit.progress import peak_memory  # noqa: E402
from facekit.split import Fold  # noqa: E402

COMMAND = ' '.join(['python', *sys.argv])
RUNS, SECONDS = 5, 0.5                     # timed blocks of each row, and how long each shall take
CLASSES = 10572                            # people of CASIA-WebFace; a toy has its own number
PAIRS, SEARCH = 6000, (512, 16384)         # pairs of LFW; probes and gallery of a search
RECORDS, INDEX = 200_000, 4_000_000        # of the record sets that are opened
LOADED = 16384                             # images that are streamed in a turn


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


class Timer:
    """Times `do(count)`, which does a thing `count` times; .times are seconds of one."""

    def __init__(self, do, device, flops=False):
        self.do, self.device, self.times, self.flops = do, device, [], 0
        self.first = took = self.block(1)
        with contextlib.suppress(OSError):                 # Linux alone can forget the peak
            Path('/proc/self/clear_refs').write_text('5')
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        if flops:                                          # compiled code would hide them
            with torch.compiler.set_stance('force_eager'), FlopCounterMode(display=False) as found:
                self.block(1)
            self.flops = found.get_total_flops()
        took = self.block(1) if flops or took < SECONDS else took
        self.count, self.turns = math.ceil(SECONDS / took), RUNS if took < 2 * SECONDS else 3

    def block(self, count):
        begin = time.perf_counter()
        with quiet():
            self.do(count)
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - begin) / count


class Bench:
    """Drawn data in the shapes of a config, and what was measured on it."""

    def __init__(self, cfg, device, folder):
        self.cfg, self.device, self.folder, self.rows = cfg, device, folder, []
        self.classes, size = cfg.toy.identities or CLASSES, cfg.data.size
        count = max(2 * cfg.mae.batch, 2 * cfg.fr.batch, self.classes)
        self.images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
        self.store = batches.Store(ImageRows(self.images, np.arange(count)), device)
        self.faces = FaceSet(Path('drawn'), self.images, np.arange(count) % self.classes,
                             np.arange(self.classes).astype(str),
                             np.arange(count, dtype=np.uint64), [])
        self.drawn = toy.draw(np.arange(64), np.zeros(64, int), size)
        self.teacher = cfg.teacher.checkpoint or str(folder / 'teacher.pt')
        if not cfg.teacher.checkpoint:
            net = models.iresnet(cfg.teacher.depth, cfg.teacher.width, size, cfg.fr.dim)
            for norm in (m for m in net.modules() if hasattr(m, 'running_mean')):
                norm.momentum = 1.0                  # or the maps of a deep untrained net overflow
            embed.embed_batch(net, torch.from_numpy(self.images[:16]), 'fp32')
            torch.save({'net': net.state_dict(), 'config': as_dict(cfg)}, self.teacher)
        side = 8192 if device.type == 'cuda' else 1024
        x = torch.randn(side, side, device=device, dtype={
            'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': None}[cfg.run.precision])
        self.matmul = 2 * side ** 3 / min(self.timed(lambda: x @ x).times)

    def timed(self, do, flops=False, peers=()):
        """A Timer of do() that took turns with the Timers `peers`."""
        def repeat(count):
            for _ in range(count):
                do()
        timer = Timer(repeat, self.device, flops)
        for _ in range(timer.turns):
            for t in (timer, *peers):
                t.times.append(t.block(t.count))
        return timer

    def row(self, stage, what, t, items, unit='images/s', kit=None, gathers=0):
        """Keep what Timer t found of a thing that takes `items` and `gathers` so many images.
        `kit`, the kit's Timer of the same thing, makes it a peer."""
        middle = np.median(t.times)
        memory = peak_memory()
        found = {'stage': stage, 'what': what, 'rate': items / middle, 'unit': unit,
                 'ms': middle * 1e3, 'ms_min': min(t.times) * 1e3, 'ms_max': max(t.times) * 1e3,
                 'runs': len(t.times), 'first_seconds': t.first, 'memory_gib': memory / 2 ** 30}
        if t.flops:
            found |= {'gflop': t.flops / 1e9, 'tflops': t.flops / middle / 1e12,
                      'of_peak': t.flops / middle / self.matmul}
        if kit:
            found['times_as_long'] = middle / np.median(kit.times)
        if gathers:
            numbers = torch.randint(len(self.images), (gathers,))
            found['data'] = np.median(self.timed(lambda: self.store(numbers)).times) / middle
        self.rows.append(found)
        run.say(f'{stage}: {what}: {found["rate"]:,.1f} {unit}')

    def train_mae(self, related, batch, flops=False, peers=()):
        variant, none = variants(self.cfg, False)[0], np.arange(0)
        c, fold = variant.cfg, Fold(0, self.faces, self.faces, none, np.arange(2 * batch), none,
                                    none)
        c.mae.batch, c.mae.lr, c.mae.epochs, c.mae.preview_epochs = batch, 1e-9, 1e6, 0
        c.irm.weight, c.irm.warmup_epochs = related and (self.cfg.irm.weight or 1.0), 0
        c.teacher.checkpoint, c.mae.init, c.run.save_minutes = self.teacher, '', 1e9
        return self.steps(train_mae.train(variant, fold, self.device), flops, peers)

    def train_fr(self, flops=False, peers=()):
        c = variants(self.cfg, False)[0].cfg
        c.fr.lr, c.run.save_minutes = 1e-9, 1e9
        what = train_fr.Recogniser('student', self.folder / 'fr.pt', self.faces,
                                   np.arange(len(self.images)), c.fr.depth, c.fr.width, 1e6, 0, [],
                                   'fr')
        return self.steps(train_fr.train(c, what, self.device), flops, peers)

    def steps(self, training, flops, peers):
        t = self.timed(lambda: next(training), flops, peers)
        run.Stop.end()
        return t


def stages(b):
    """Rows of stages 1 to 4."""
    cfg, c, device, store = b.cfg, b.cfg.reconstruct, b.device, b.store
    for related in (False, True):
        b.row('1 train', f'step {"with" if related else "without"} IRM',
              b.train_mae(related, cfg.mae.batch, True), cfg.mae.batch, gathers=cfg.mae.batch)
    b.row('3 recognise', f'step, {b.classes:,} classes', b.train_fr(True), cfg.fr.batch,
          gathers=cfg.fr.batch)

    some, few = (torch.arange(min(batch, len(store)), device=device)
                 for batch in (c.batch, cfg.evaluate.batch))
    mae = protect.FaceMAE(protect.build_mae(cfg.mae, cfg.data.size).to(device).eval(),
                          torch.full((3, 1, 1), 0.5, device=device), protect.STD)
    protection, seeds = protect.Protection(cfg, mae), batches.image_seeds(0, some)
    b.row('2 reconstruct', c.method, b.timed(
        lambda: protection(store(some), seeds).cpu(), True), len(some))
    b.row('2 reconstruct', f'{c.format} files, one core', b.timed(
        lambda: [images.encode(x, c.format, c.quality) for x in b.drawn]), len(b.drawn))

    net = embed.recogniser(b.teacher, device)
    nets = {'recogniser': net, 'BatchNorm folded': models.folded(net)}
    if device.type == 'cuda':
        nets['folded, compiled'] = torch.compile(nets['BatchNorm folded'])
    for name, net in nets.items():
        b.row('4 evaluate', f'embeddings, {name}', b.timed(
            lambda: embed.embed_batch(net, store(few), cfg.run.precision), True), len(few))
    probes, gallery = (F.normalize(torch.randn(n, cfg.fr.dim, device=device)) for n in SEARCH)
    search = retrieval.Search(probes, gallery, np.arange(SEARCH[0]), np.arange(SEARCH[1]) // 20,
                              device)
    b.row('4 evaluate', 'search, 20 images a person', b.timed(
        lambda: retrieval.rank(search, 'same_person')), SEARCH[0] * SEARCH[1], 'comparisons/s')
    same, rng = np.arange(PAIRS) % 2 == 0, np.random.default_rng(0)
    distance = rng.normal(np.where(same, 1.2, 1.9), 0.4).clip(0, 4)
    kit, loop = (b.timed(lambda: fold(distance, same))
                 for fold in (verification.fold_accuracies, loop_accuracies))
    b.row('4 evaluate', 'ten folds', kit, PAIRS, 'pairs/s')
    b.row('4 evaluate', 'ten folds, plain loop', loop, PAIRS, 'pairs/s', kit)


def loop_accuracies(distance, same):
    """Accuracies of ten folds as they are usually computed: one threshold at a time."""
    accuracies, thresholds, everyone = [], np.arange(0, 4, 0.01), np.arange(len(same))
    for test in np.array_split(everyone, 10):
        train = np.setdiff1d(everyone, test)
        right = [np.mean((distance[train] < limit) == same[train]) for limit in thresholds]
        best = thresholds[np.argmax(right)]
        accuracies.append(np.mean((distance[test] < best) == same[test]))
    return np.array(accuracies)


def reading(b):
    """Rows of record sets, the first look at one, and batches."""
    c, size, folder = b.cfg, b.cfg.data.size, b.folder
    files = [images.encode(x, 'jpeg', 95) for x in b.drawn] * 64
    records.write_records(folder / 'faces', files, np.arange(len(files)) // 64, size)
    b.row('reading', 'images decoded, one core', b.timed(
        lambda: [images.decode(x, 'face') for x in files[:64]]), 64)

    def look():
        shutil.rmtree(folder / 'looks', ignore_errors=True)
        faces.load(folder / 'faces', c)
    b.row('reading', 'looked at, all cores', b.timed(look), len(files))
    kit, floats, theirs = loaders.take_turns(folder / 'faces', b.cfg, b.device, c.fr.batch, LOADED,
                                             RUNS)
    count = LOADED // c.fr.batch * c.fr.batch
    b.row('reading', 'decoded as they are read', kit, count)
    b.row('reading', 'the same, normalised', floats, count)
    b.row('reading', 'a DataLoader, image by image', theirs, count, kit=kit)

    for count in (RECORDS, INDEX):
        files = (bytes(32) for _ in range(count))          # framing alone is read
        records.write_records(folder / 'index', files, np.arange(count) // 20, size)
        b.row('reading', f'{count:,} records opened', b.timed(
            lambda: records.Records(folder / 'index')), count, 'records/s')
    opened = records.Records(folder / 'index')
    b.row('reading', 'records viewed, one core', b.timed(
        lambda: sum(len(opened[i]) for i in range(1000))), 1000, 'records/s')

    b.row('reading', f'batch of {len(b.images):,} images', b.timed(
        lambda: b.store(torch.randint(len(b.store), (c.mae.batch,)))), c.mae.batch)
    try:
        sparse = np.memmap(folder / 'images.u8', np.uint8, 'w+', shape=(INDEX, size, size, 3))
        store = batches.Store(ImageRows(sparse, np.arange(INDEX)), b.device)
        b.row('reading', f'batch of {INDEX:,} images', b.timed(
            lambda: store(torch.randint(INDEX, (c.mae.batch,)))), c.mae.batch)
    except OSError as e:
        run.say(f'reading: {INDEX:,} decoded images cannot be mapped: {e}')


def main(folder, cfg, device, compare):
    """Measure, write the JSON and show the table; `folder` holds the peers, or is empty."""
    if run.world() > 1:
        raise InputError('bench.py measures one process: run it with python, not torchrun')
    name = torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU {os.cpu_count()} cores'
    found = run.provenance() | {'device': name, 'threads': torch.get_num_threads(),
                                    'command': COMMAND, 'config': as_dict(cfg)}
    cfg = variants(cfg, False)[0].cfg               # with all values resolved
    with tempfile.TemporaryDirectory() as temporary:
        cfg.run.folder = temporary
        b = Bench(cfg, device, Path(temporary))
        stages(b)
        reading(b)
        if folder:
            import peers
            peers.compare(b, Timer, Path(folder))
    found |= {'modules': {n: sys.modules[n].__version__ for n in (
        'torchvision', 'timm', 'transformers') if n in sys.modules},
              'matmul_tflops': b.matmul / 1e12, 'rows': b.rows}
    stem = f'{name} {Path(cfg.run.config).stem}'.lower()
    path = Path('results/speed', re.sub('[^a-z0-9]+', '-', stem) + '.json')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + '\n')

    columns = {'stage': '{}', 'what': '{}', 'rate': '{:,.0f}', 'unit': '{}', 'ms': '{:,.2f}',
               'ms_min': '{:,.2f}', 'ms_max': '{:,.2f}', 'tflops': '{:.3g}', 'of_peak': '{:.0%}',
               'memory_gib': '{:.2f}', 'data': '{:.1%}', 'times_as_long': '{:.2f}'}
    table = Table(*(Column(name, justify='left' if form == '{}' else 'right')
                    for name, form in columns.items()), title=f'{path.stem}, {cfg.run.precision}; '
                  f'matrix product: {b.matmul / 1e12:.3g} TFLOP/s')
    for row in b.rows:
        columns['rate'] = '{:,.0f}' if row['rate'] > 100 else '{:.1f}'
        table.add_row(*(form.format(row[column]) if column in row else ''
                        for column, form in columns.items()))
    Console(width=160).print(table)
    run.say(path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--peers', default='')
    own, sys.argv[1:] = parser.parse_known_args()
    run.launch(lambda *rest: main(own.peers, *rest), None)
