"""Damaged and hostile files (hostile.py) end in success or in one sentence.

Run as a script, this file is the process that reads them: it imports the kit once and forks a
child with bounded memory and time for each kind of file.
"""
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = ('record', 'bin', 'image', 'yaml', 'checkpoint', 'folder', 'look', 'pairs', 'onnx', 'json')
MANY, FEW = 1000, 120     # files of each kind, those made by hand first
MEMORY = 3 << 29          # bytes that a child may take beside its imports
SECONDS = 20              # for one case


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


def read_all(kind, folder, evil, count):
    """Every case of a kind; a line of <folder>/log for each, which a crash leaves unfinished."""
    import hostile
    from facekit.base.errors import InputError
    chance = random.Random(kind)
    sound, made, read = getattr(hostile, f'{kind}_files')(folder, evil)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(folder / 'log', 'w', buffering=1) as log:
        for number in range(count):
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
                        and (str(folder) in text or kind == 'yaml'))     # which names its keys
                log.write('refused\n' if good else f'WRONG WORDS {text[:1000]!r}\n')
            except BaseException as e:
                log.write(f'{type(e).__name__}\n')
                traceback.print_exc()
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            if whole is not None:
                path.write_bytes(whole)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 1 << 20, f'{taken} KiB'


def main(folder, count):
    # Importing is all that this process may do: computing would start threads, which a fork lacks
    import hostile
    evil = hostile.Call(os.system, f'touch {folder}/canary')
    for kind in KINDS:
        (folder / kind).mkdir()
        code = in_child(partial(read_all, kind, folder / kind, evil, count), 120,
                        folder / kind / kind)
        (folder / kind / 'code').write_text(str(code))


if __name__ == '__main__':
    main(Path(sys.argv[1]), int(sys.argv[2]))


# ------------------------------------------------------------------------------------ the tests

@pytest.fixture(scope='module', params=[FEW, pytest.param(MANY, marks=pytest.mark.long)])
def folder(tmp_path_factory, request):
    """What main() left behind."""
    folder = tmp_path_factory.mktemp('fuzz')
    done = subprocess.run([sys.executable, __file__, folder, f'{request.param}'],
                          capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize('kind', KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(folder, kind):
    lines = (folder / kind / 'log').read_text().splitlines()
    wrong = [x for x in lines if not x.endswith((': read', ': refused'))]
    told = (folder / kind / f'{kind}.err').read_text()
    assert not wrong and (folder / kind / 'code').read_text() == '0', f'{wrong} {told[-3000:]}'
    assert len(lines) in (FEW, MANY)
    refused = sum(x.endswith(': refused') for x in lines)
    print(kind, len(lines), 'files,', refused, 'refused')
    if kind != 'look':                                         # which is made anew
        assert 0.2 * len(lines) < refused < len(lines)         # both happen


def test_nothing_that_was_read_ran(folder):
    assert not (folder / 'canary').exists()
    from hostile import Call
    pickle.loads(pickle.dumps(Call(os.system, f'touch {folder}/canary')))
    assert (folder / 'canary').exists()                        # as a careless reader would have it


def test_hostile_lines_of_a_log_are_passed_over(tmp_path):
    from facekit.base.log import StageLog, read_log, stage_seconds
    from hostile import json_files
    path = tmp_path / 'log' / 'student.jsonl'
    path.parent.mkdir()
    texts = [content for _, content in json_files(tmp_path, None)[1] if isinstance(content, bytes)]
    path.write_bytes(b'\n'.join([*texts, b'{"step": 4, "seconds": 2.5}', b'{"step": ' + b'9' * 400
                                 + b'}', b'{"step": 5, "seconds": ' + b'9' * 400 + b'}']))
    assert [entry['step'] for _, entry in read_log(path)] == [4]
    StageLog(tmp_path, 'student', 10, 5)(6, 1, loss=1.0)
    assert stage_seconds(tmp_path)['student'] == 2.5
