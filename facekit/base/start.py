"""A stage imports this first: --help needs not wait for torch, and what is not installed is said
before an import fails."""
import importlib.util
import sys

PACKAGES = 'torch', 'torchvision', 'einops', 'numpy', 'PIL', 'yaml', 'rich'

if {'-h', '--help'} & set(sys.argv[1:]):
    print(f'''usage: {sys.argv[0]} [CONFIG.yaml] [--compare] [section.key=value ...]

{sys.modules['__main__'].__doc__}
CONFIG.yaml        the experiment (default: the toy); configs/casia.yaml explains every key
--compare          all rows of the config's comparison
section.key=value  sets a key of the config, for example mae.epochs=100''')
    sys.exit()
if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
    sys.exit(f'error: {", ".join(missing)} not installed for {sys.executable}: run '
             '`source .venv/bin/activate` first, after `make .venv/ready` has made it')
