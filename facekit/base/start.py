"""A stage imports this first: --help needs not wait for torch, and what is not installed is said
before an import fails."""
import importlib.util
import os
import signal
import sys
from pathlib import Path

KIT = Path(__file__).parents[2]
PACKAGES = 'torch', 'torchvision', 'einops', 'numpy', 'PIL', 'yaml', 'rich'


def stopped(number, frame):
    """Ctrl-C while torch is imported, whose C code could make anything of an exception."""
    if os.environ.get('RANK', '0') == '0':
        os.write(2, b'\nstopped before anything began; the same command begins again\n')
    os._exit(130)


for name in ('stdout', 'stderr'):      # closed by the shell: another file would take its number
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, 'w'))
if KIT == Path(getattr(sys.modules['__main__'], '__file__', '/')).resolve().parent:
    signal.signal(signal.SIGINT, stopped)
if {'-h', '--help'} & set(sys.argv[1:]):
    text = f'''usage: {sys.argv[0]} [CONFIG.yaml] [--compare] [section.key=value ...]

{sys.modules['__main__'].__doc__}
CONFIG.yaml        the experiment (default: the toy); configs/casia.yaml explains every key
--compare          all rows of the config's comparison
section.key=value  sets a key of the config, for example mae.epochs=100'''
    try:
        print(text, flush=True)
    except OSError as error:           # sys.exit() would try to write it once more
        os.write(2, f'error: no help ({error.strerror}): write it elsewhere\n'.encode())
        os._exit(2)
    sys.exit()
if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
    sys.exit(f'error: {", ".join(missing)} not installed for {sys.executable}: run '
             '`source .venv/bin/activate` first, after `make .venv/ready` has made it')
if sys.stdout.isatty():
    print('loading torch ...', end='\r', flush=True)
