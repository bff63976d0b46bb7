"""The log of a stage: one JSON object a line in a file, one line for people on the screen."""
import contextlib
import datetime
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

from facekit.base import files, process
from facekit.base.errors import optional


class StageLog:
    """Log of one stage, <folder>/log/<stage>.jsonl, written by rank 0.

    A stage that continues from `step` first drops its later lines.
    """

    def __init__(self, folder, stage, total, step=0, tensorboard=False):
        self.path, self.stage, self.total = Path(folder, 'log', f'{stage}.jsonl'), stage, total
        self.begin, self.first, self.writer = time.time(), step, None
        if process.rank():
            return
        if tensorboard:                  # which drops what it has of later steps, too
            optional('tensorboard', 'tensorboard')
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(Path(folder, 'tensorboard', stage), purge_step=step + 1)
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
        if self.writer:
            for name, value in entry.items():
                if isinstance(value, (int, float)) and name != 'step':
                    self.writer.add_scalar(name, value, step)
            self.writer.flush()
        left = seconds / max(step - self.first, 1) * (self.total - step)
        self.show(step, f'{images / seconds:,.0f} img/s', left, values)

    def show(self, step, speed, left, values):
        """A line that is overwritten in a terminal, or one of its own elsewhere; `left`: seconds
        until the end of the stage."""
        texts = {k: f'{v:.3g}' if isinstance(v, (int, float)) else v or '-'
                 for k, v in values.items() if k != 'lr'}
        shown = '  '.join(f'{k} {text}' for k, text in texts.items())
        left = datetime.timedelta(seconds=round(left))
        stage = ' '.join(filter(None, [os.environ.get('STAGE'), self.stage]))
        line = f'[{stage}] {step}/{self.total}  {left} left  {speed}  {shown}'
        if sys.stdout.isatty():
            overwrite(line, '\n' if step == self.total else '')
        else:
            print(line[:100], flush=True)

    def announce(self, text):
        """Say what is being done in a terminal's live line; it is not logged."""
        if process.rank() == 0 and sys.stdout.isatty():
            overwrite(f'[{self.stage}] {text} ...')


def overwrite(line, end=''):
    """Replace the live line of a terminal; the last one of a stage remains."""
    width = shutil.get_terminal_size().columns - 1
    print('\r\x1b[K' + line[:width], end=end, flush=True)


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
