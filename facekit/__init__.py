"""What the four stages of the kit share, in the order in which it is built.

errors, config, run, progress, files, images, records, toy, sources, faces, split, batches, embed,
training, protect, verification, attack_data, retrieval, mask_attacks, attacks, plots, report, page,
check: a module imports only from those before it.

A stage imports this package first: what is missing is then said before an import fails, and --help
needs not wait for torch.
"""
import importlib.util
import sys

PACKAGES = {'torch', 'torchvision', 'einops', 'numpy', 'PIL', 'yaml', 'rich', 'filelock'}

main = sys.modules.get('__main__')
if getattr(main, '__doc__', None) and {'-h', '--help'} & set(sys.argv[1:]):
    print(f'''usage: {sys.argv[0]} [CONFIG.yaml] [--compare] [--check] [section.key=value ...]

{main.__doc__}
CONFIG.yaml        the experiment (default: the toy); configs/casia.yaml explains every key
--compare          all rows of the config's comparison
--check            only check, in seconds, whether the whole experiment can be run
section.key=value  sets a key of the config, for example mae.epochs=100''')
    sys.exit()
missing = sorted(name for name in PACKAGES if not importlib.util.find_spec(name))
if missing:
    sys.exit(f'error: {", ".join(missing)} not installed for {sys.executable}: run '
             '`source .venv/bin/activate` first, after `make .venv/ready` has made it')
