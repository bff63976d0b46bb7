"""Damaged and hostile files (hostile.py) end in success or in one sentence, with exit code 2.

Run as a script, this file is the process that reads them: it imports the kit once and forks a
child with bounded memory and time for each kind of file, and for each run of a script.
"""
import io
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
CASES = {'record': 600, 'bin': 500, 'image': 600, 'yaml': 250, 'checkpoint': 400, 'folder': 150}
MEMORY = 3 << 29          # bytes that a child may take beside its imports
SECONDS = 20              # for one case; a run of a script may take three times as long

RUN = {'base': str(ROOT / 'tests' / 'tiny.yaml'), 'compare': {},
       'run': {'folder': 'run', 'threads': 1, 'device': 'cpu'}, 'data': {'size': 16},
       'toy': {'identities': 12, 'images': 4, 'test_identities': 4, 'test_pairs': 20},
       'teacher': {'epochs': 1}, 'judge': {'epochs': 1},
       'mae': {'epochs': 1, 'batch': 8, 'micro_batch': 8},
       'fr': {'epochs': 1, 'batch': 8, 'norm_batch': 8},
       'evaluate': {'attacks': ['judge', 'pixels', 'insider']}}
PIPELINE = ['train_fr.py stage=teacher', 'train_fr.py stage=judge', 'train_mae.py',
            'reconstruct.py', 'train_fr.py', 'evaluate.py']
NEW = 'train_fr.py stage=teacher run.folder=new'
DAMAGED = {   # each is cut off, mutated, and replaced by a malicious and by a foreign checkpoint
    'faces/train.rec': NEW,
    'faces/train.idx': NEW,
    'faces/toy.bin': 'evaluate.py',
    'run/fold0/teacher.pt': 'train_mae.py mae.name=new',
    'run/fold0/judge.pt': 'evaluate.py',
    'run/fold0/mae.pt': 'reconstruct.py reconstruct.photos=photos',
    'run/fr.pt': 'train_fr.py',
    'run/reconstructed/train.rec': 'train_fr.py run.folder=new release=run/reconstructed',
    'photos/0.jpg': 'reconstruct.py reconstruct.photos=photos',
    'run.yaml': NEW}
REFUSED = [   # a pipe never ends, a loop is a link to itself
    f'{NEW} --config ../pipe', f'{NEW} --config ../loop', 'evaluate.py evaluate.sets=[../pipe]',
    'train_mae.py mae.name=new teacher.checkpoint=../pipe', f'{NEW} data.root=../pipe',
    'train_fr.py stage=teacher run.folder=../loop', f'{NEW} run.folder=run.yaml',
    f'{NEW} teacher.width=16384', 'reconstruct.py reconstruct.photos=../folders']


# ------------------------------------------------------------- the process that reads the files

def in_child(action, seconds, name):
    """Exit code of a forked process in which action() ran; negative if a signal ended it."""
    child = os.fork()
    if not child:
        for number, stream in (1, 'out'), (2, 'err'):
            os.dup2(os.open(f'{name}.{stream}', os.O_CREAT | os.O_WRONLY), number)
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.alarm(seconds)
        code = 1
        try:
            action()
            code = 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_all(kind, folder, evil):
    """Every case of a kind; a line of <folder>/log for each, which a crash leaves unfinished."""
    import hostile
    from facekit.base.errors import InputError
    chance = random.Random(kind)
    sound, made, read = getattr(hostile, f'{kind}_files')(folder, evil)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(folder / 'log', 'w', buffering=1) as log:
        for number in range(CASES[kind]):
            if made:
                path, content = made.pop(0)
            else:
                path, content, repair = chance.choice(sound)
                content = hostile.mutated(content, chance)
                content = repair(content) if repair else content
            whole = path.read_bytes() if path.is_file() else None
            path.unlink(missing_ok=True)
            content(path) if callable(content) else path.write_bytes(content)
            log.write(f'{number} {path.name!r}: ')
            log.flush()
            signal.alarm(SECONDS)
            try:
                read()
                log.write('read\n')
            except InputError as e:
                text = str(e)
                good = (text.isprintable() and len(text) < 1000 and 'MemoryError' not in text
                        and (str(folder) in text or text.startswith('config /')))
                log.write('refused\n' if good else f'WRONG WORDS {text[:1000]!r}\n')
            except BaseException as e:
                log.write(f'{type(e).__name__}\n')
                traceback.print_exc()
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            if whole is not None:
                path.write_bytes(whole)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 1 << 20, f'{taken} KiB'


def main(folder):
    # Importing is all that this process may do: computing would start threads, which a fork lacks
    import evaluate  # noqa: F401
    import hostile
    import train_fr  # noqa: F401
    evil = hostile.Call(os.system, f'touch {folder}/canary')
    for kind in CASES:
        (folder / kind).mkdir()
        code = in_child(partial(read_all, kind, folder / kind, evil), 60, folder / kind / kind)
        (folder / kind / 'code').write_text(str(code))

    def script(words, name):
        def action():
            os.chdir(folder / 'work')
            script, *rest = words.split()
            sys.argv = [script, '--config', 'run.yaml', *rest]
            runpy.run_path(str(ROOT / script), run_name='__main__')
        with open(folder / 'codes', 'a') as codes:
            codes.write(f'{in_child(action, 3 * SECONDS, folder / name)} {name} {words}\n')

    def renew(path=None, content=b''):
        shutil.rmtree(folder / 'work')
        shutil.copytree(folder / 'sound', folder / 'work')
        if path:
            (folder / 'work' / path).write_bytes(content)

    def photos():
        for i, image in enumerate(hostile.faces(2)):
            (folder / 'work' / 'photos' / f'{i}.jpg').write_bytes(image)

    (folder / 'work' / 'photos').mkdir(parents=True)
    (folder / 'work' / 'run.yaml').write_text(yaml.safe_dump(RUN))
    in_child(photos, SECONDS, folder / 'photos')
    for i, words in enumerate(PIPELINE):
        script(words, f'pipeline{i}')
    shutil.copytree(folder / 'work', folder / 'sound')
    os.mkfifo(folder / 'pipe')
    (folder / 'loop').symlink_to('loop')
    (folder / 'folders' / '0.jpg').mkdir(parents=True)
    for i, words in enumerate(REFUSED):
        renew()
        script(words, f'refused{i}')
    chance, foreign = random.Random(0), io.BytesIO()
    torch.save({'net': 3}, foreign)
    for i, (path, words) in enumerate(DAMAGED.items()):
        content = (folder / 'sound' / path).read_bytes()
        for j, wrong in enumerate((content[:len(content) // 2], hostile.mutated(content, chance),
                                   pickle.dumps(evil, 2), foreign.getvalue())):
            renew(path, wrong)
            script(words, f'damaged{i}.{j}')


if __name__ == '__main__':
    main(Path(sys.argv[1]))


# ------------------------------------------------------------------------------------ the tests

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What main() left behind."""
    folder = tmp_path_factory.mktemp('fuzz')
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize('kind', CASES)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(folder, kind):
    lines = (folder / kind / 'log').read_text().splitlines()
    wrong = [x for x in lines if not x.endswith((': read', ': refused'))]
    told = (folder / kind / f'{kind}.err').read_text()
    assert not wrong and (folder / kind / 'code').read_text() == '0', f'{wrong} {told[-3000:]}'
    assert len(lines) == CASES[kind] and sum(CASES.values()) >= 2500
    refused = sum(x.endswith(': refused') for x in lines)
    assert 0.3 * len(lines) < refused < 0.99 * len(lines)      # both happen


def test_scripts_end_with_0_or_with_2_and_one_sentence(folder):
    codes = [x.split(' ', 2) for x in (folder / 'codes').read_text().splitlines()]
    assert len(codes) == len(PIPELINE) + len(REFUSED) + 4 * len(DAMAGED)
    for code, name, words in codes:
        told = (folder / f'{name}.err').read_text()
        assert code in ('0', '2') and 'Traceback' not in told, f'{name} {words} {code} {told}'
        assert code == '0' or told.splitlines()[-1].startswith('error: '), f'{name} {words} {told}'
        assert code == '2' or not name.startswith('refused'), words
        assert code == '0' or not name.startswith('pipeline'), f'{words} {told}'
    assert sum(code == '2' for code, *_ in codes) >= len(REFUSED) + 3 * len(DAMAGED)


def test_nothing_that_was_read_ran(folder):
    assert not (folder / 'canary').exists()
    from hostile import Call
    pickle.loads(pickle.dumps(Call(os.system, f'touch {folder}/canary')))
    assert (folder / 'canary').exists()                        # as a careless reader would have it
