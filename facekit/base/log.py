"""The log of a stage: one JSON object a line in a file, one line for people on the screen."""
import contextlib
import datetime
import json
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path

import torch

from facekit.base import files, machine, process


class StageLog:
    """Log of one stage, <folder>/log/<stage>.jsonl, written by rank 0.

    A stage that continues from `step` first drops its later lines.
    """

    def __init__(self, folder, stage, total, step=0):
        self.path, self.stage, self.total = Path(folder, 'log', f'{stage}.jsonl'), stage, total
        self.begin, self.first = time.time(), step
        if process.rank():
            return
        with files.replacing(self.path) as file:
            for line, entry in read_log(self.path):
                if entry['step'] <= step:
                    file.write(f'{line}\n'.encode())

    def seconds(self):
        """Seconds since this process began the stage."""
        return max(time.time() - self.begin, 1e-9)

    def __call__(self, step, images, **values):
        """Log `values` at `step`; `images` is how many the run has taken since it (re)started.

        None is the value of what is not active, and is shown as "-".
        """
        if process.rank():
            return
        seconds = self.seconds()
        values = {k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in values.items()}
        entry = {'stage': self.stage, 'step': step, **values,
                 'images_per_second': round(images / seconds, 1), 'seconds': round(seconds, 2),
                 'memory_gib': round(peak_memory() / 2 ** 30, 2)}
        with open(self.path, 'a') as file:
            file.write(json.dumps(entry) + '\n')
        left = datetime.timedelta(seconds=round(seconds / max(step - self.first, 1)
                                                * (self.total - step)))
        figures = [figure_text(name, value) for name, value in values.items() if name != 'lr']
        line = fitting(self.stage, [f'{100 * step // self.total} %', f'{left} left',
                                    f'{images / seconds:,.0f} img/s', *figures])
        if sys.stdout.isatty():
            overwrite(line, '\n' if step == self.total else '')
        else:
            print(line, flush=True)

    def announce(self, text):
        """Say what is being done in a terminal's live line; it is not logged."""
        if process.rank() == 0 and sys.stdout.isatty():
            overwrite(f'[{self.stage}] {text} ...')


def figure_text(name, value):
    """A figure of the log for people: 'loss 0.123', 'accuracy 83.1 %', 'irm -' if not active."""
    if not isinstance(value, (int, float)):
        return f'{name} {value or "-"}'
    return f'{name} {100 * value:.1f} %' if name == 'accuracy' else f'{name} {value:.3g}'


def fitting(stage, parts):
    """A line that is whole in a terminal, or in 79 columns elsewhere. Where there is too little
    room, the stage loses its number and then the first parts of its name, and what comes after
    progress, time, speed and two losses is left out."""
    width = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else 79
    number = os.environ.get('STAGE', '')               # among all that reproduce.sh runs: 3/6
    for name in (f'{number} {stage}'.strip(), stage, Path(stage).name):
        line = ' '.join([f'[{name}]', *parts[:5]])
        if len(line) <= width:
            break
    for part in parts[5:]:
        if len(line) + 1 + len(part) <= width:
            line += f' {part}'
    return line


def overwrite(line, end=''):
    """Replace the live line of a terminal; the last one of a stage remains."""
    width = shutil.get_terminal_size().columns - 1
    print('\r\x1b[K' + textwrap.shorten(line, width, placeholder=' ...'), end=end, flush=True)


def read_log(path):
    """The sound lines of a log as (text, object); a kill or a stranger can leave others."""
    text = path.read_bytes().decode(errors='replace') if path.is_file() else ''
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entry = files.parsed(line)
            if isinstance(entry.get('step'), int):
                yield line, entry


def stage_seconds(folder):
    """Wall time of each stage of a run: an interrupted stage is the sum of its pieces."""
    total = {}
    for path in sorted(Path(folder, 'log').rglob('*.jsonl')):
        stage, last = str(path.relative_to(Path(folder, 'log')).with_suffix('')), 0
        for _, entry in read_log(path):
            seconds = entry.get('seconds')
            if isinstance(seconds, (int, float)):
                begun = last if seconds > last else 0       # else a new piece began
                total[stage] = total.get(stage, 0) + seconds - begun
                last = seconds
    return {stage: round(seconds, 1) for stage, seconds in total.items()}


def peak_memory():
    """The most memory that was taken, bytes: by tensors on a GPU, else by this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return machine.most_memory()
