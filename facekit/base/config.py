"""One YAML file is one experiment: read, check, and override it from the command line.

configs/casia.yaml holds every key with its default, its spec (what it can be) and its meaning;
another config names only what differs. YAML is read as text, which becomes what the spec says.
`resolve` gives nested dicts, `namespace` makes them `cfg.mae.lr`, `variants` the rows and seeds.
"""
import contextlib
import copy
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import yaml

from facekit.base.errors import InputError, printable, quoted

CONFIGS = Path(__file__).parents[2] / 'configs'
# What the kit calls its own in run folders, and pictures in figures/, where a row has its own
RESERVED = ('fold', 'seed', 'figures', 'reconstructed', 'looks', 'faces', 'log', 'scores',
            'external', 'release', 'photos', 'roc', 'tradeoff', 'losses')
# What rows may change, but for keys OF_COMMANDS; they share all else: people, split, judge and run
# folder
OF_COMMANDS = [f'reconstruct.{key}' for key in ('remove', 'check', 'photos', 'export', 'key')]
OF_ROWS = 'mae.', 'irm.', 'reconstruct.', 'fr.', 'evaluate.', 'teacher.checkpoint'


class TextLoader(yaml.BaseLoader):
    """Texts, lists and mappings; no key twice, of which YAML would keep the last one, and no
    aliases, by which a few lines can stand for more than fits into memory."""

    def check_printable(self, data):
        """Let Python's stand-ins pass for the bytes of a name that is no UTF-8."""
        super().check_printable(re.sub('[\udc80-\udcff]', '?', data))

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f'it has the alias *{self.peek_event().anchor}: write it out')
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f'it has {name!r} twice (lines {lines[name]} and {line})')
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """The mapping in a YAML file, with texts for values."""
    if not os.path.isfile(path):           # False, too, for a path that no file can have
        raise InputError(f'config {path} does not exist: name a file such as configs/toy.yaml')
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), TextLoader)
    except Exception as e:                 # bytes and deep nesting raise errors of many kinds
        raise InputError(f'config {path} is no readable YAML ({" ".join(str(e).split())[:200]}): '
                         'name a file such as configs/toy.yaml') from None
    if not isinstance(content, dict) or any('.' in name for name in content):
        raise InputError(f'config {path} has other lines than "section:" and "  key: value"')
    return content


def read_specs(path):
    """{section.key: spec} from the comments of casia.yaml, which begin with the spec."""
    text, specs, section = path.read_text(encoding='utf-8'), {}, ''
    for indent, key, spec in re.findall(r'^(  )?(\w+):(?:.*?# ([^:\n]+): )?', text, re.MULTILINE):
        section = section if indent else key
        if spec:
            specs[f'{section}.{key}' if indent else key] = spec
    return specs


def key_path(text, name='reconstruct.key'):
    """The file with the secret, at a path relative to where one is or to the kit. The InputError
    for another text does not repeat it, as it may be the secret itself; `name` is who has it."""
    for folder in (Path(), CONFIGS.parent):
        path = folder / os.path.expanduser(str(text))
        if os.path.isfile(path):
            return path
    raise InputError(f'{name} names no file that is there: give the path of a file with the '
                     'secret, or leave it empty to have a new one drawn')


def check_value(name, value, spec):
    """What a text (or list, or mapping) stands for by a spec; `name` is who has it."""
    if name.endswith('reconstruct.key') and value:
        return str(key_path(value, name))
    if name.endswith('mae.name') and str(value).lower() in ('teacher', 'judge'):
        raise InputError(f'{name} = {value} is the name of another net\'s file: choose another, '
                         'such as mae2')
    kind, _, item = spec.partition(' of ')
    if kind == 'map' and isinstance(value, dict):
        return {key: check_value(f'{name}.{key[:60]}', part, item) for key, part in value.items()}
    if kind == 'reference' and isinstance(value, dict) and 'source' in value:
        specs = {key: f'two of {item}' if isinstance(part, list) else item
                 for key, part in value.items()} | {'source': 'text'}
        return {key: check_value(f'{name}.{key[:60]}', value[key], specs[key]) for key in value}
    if isinstance(value, list) and (kind == 'list' or kind == 'two' and len(value) == 2):
        return [check_value(name, part, item) for part in value]
    options = spec.split(' | ') if isinstance(value, str) and not item else []
    for option in options:
        with contextlib.suppress(ValueError):
            result = as_option(value, option)
            return result == 'true' if spec == 'true | false' else result
    raise InputError(f'{printable(name)} = {quoted(value)} does not fit: give {spec} (the head of '
                     'configs/casia.yaml says how to write it)')


def as_option(text, option):
    """The value of a text by one option of a spec; ValueError if it is something else."""
    kind, _, limits = option.partition(' ')
    if kind in ('int', 'float'):
        value = int(text) if kind == 'int' else float(text)
        low, high = limits.replace(' or more', '..2147483647').split('..')
        fits = float(low) <= value <= float(high)
    elif kind == 'path':
        value = os.path.expanduser(text) if text.startswith('~/') else text
        fits = text.isprintable() and len(text) < 400
    elif kind in ('name', 'text'):
        value, fits = text, kind == 'text' or re.fullmatch(r'[\w-]{1,60}', text)
    else:
        value = int(option) if option.isdecimal() else option
        fits = option == (text.lower() if option in ('true', 'false') else text)
    if not fits:
        raise ValueError
    return value


def set_keys(config, changes, where):
    """Set keys in `config`: {section: {key: text}} or {section.key: text}, as given in `where`."""
    for name, value in changes.items():
        section, _, key = name.rpartition('.')
        if name in SECTIONS and isinstance(value, dict):
            set_keys(config, {f'{name}.{k}': text for k, text in value.items()}, where)
        elif name in SECTIONS:
            raise InputError(f'{where}: {name} = {quoted(value)} is a section: set {name}.KEY')
        elif name not in SPECS:
            near = ([known for known in SPECS if known.endswith(f'.{key}')]
                    or difflib.get_close_matches(name[:100], SPECS))
            raise InputError(f'{where}: key {quoted(name)} is unknown: did you mean '
                             f'{" or ".join(near) or "one in configs/casia.yaml"}?')
        else:
            keys = config.setdefault(section, {}) if section else config
            value = check_value(f'{where}: {name}', value, SPECS[name])
            if name == 'data.exclude':     # nobody comes back because a later list lacks the name
                value = list(dict.fromkeys(keys.get(key, []) + value))
            keys[key] = value


def assign(config, assignment, where='command line'):
    """Apply one `section.key=value` of the command line or of a row."""
    name, equals, text = assignment.partition('=')
    if not equals or name == 'base':
        raise InputError(f'{where}: write section.key=value, not {quoted(assignment)}')
    value = text.strip()
    if value.startswith(('[', '{', '"', "'")):       # all else is text: a path may hold " #"
        try:
            value = yaml.load(value, TextLoader)
        except Exception:                            # as in read_yaml
            raise InputError(f'{where}: {quoted(name)} is given no YAML: quote it') from None
    set_keys(config, {name: value}, where)


SPECS = read_specs(CONFIGS / 'casia.yaml')
SECTIONS = {name.partition('.')[0] for name in SPECS if '.' in name}


def resolve(path, assignments=()):
    """Config file plus command line over the defaults of casia.yaml, as nested dicts."""
    path = Path(path)
    chain = [(path, read_yaml(path))]
    while base := chain[0][1].get('base'):
        before = chain[0][0]
        file = before.parent / check_value(f'{before}: base', base, SPECS['base'])
        if len(chain) > 8:
            raise InputError(f'config {path}: base leads round in a circle: remove one of them')
        chain.insert(0, (file, read_yaml(file)))
    chain.insert(0, (CONFIGS / 'casia.yaml', read_yaml(CONFIGS / 'casia.yaml')))
    config = {}
    for file, changes in chain:
        set_keys(config, changes, file)
    for assignment in assignments:
        assign(config, assignment)
    config['run']['folder'] = config['run']['folder'] or f'runs/{path.stem}'
    config['base'], config['run']['config'] = '', str(path)
    for row in config['compare']:
        config_of_row(config, row)                   # refuses it before anything is trained
    return config


def config_of_row(config, name):
    """A copy of a config with the changes of one row of its comparison."""
    if not re.fullmatch(rf'(?!{"|".join(RESERVED)})[\w-]{{1,60}}', name):
        raise InputError(f'compare has a row {quoted(name)}: use letters, digits, _ and -, and do '
                         f'not begin with {", ".join(RESERVED)}')
    row, where = copy.deepcopy(config), f'{config["run"]["config"]}: compare.{name}'
    for change in config['compare'][name]:
        assign(row, change, where)
    for key in SPECS:
        section, _, last = key.rpartition('.')
        before, after = (c[section][last] if section else c[last] for c in (config, row))
        if before != after and (not key.startswith(OF_ROWS) or key in OF_COMMANDS):
            raise InputError(f'{where} sets {key}, which all rows share: set it for all of them')
    return row


def namespace(config):
    """Nested dicts as namespaces; `as_dict` is the way back."""
    return SimpleNamespace(**{k: namespace(v) if k in SECTIONS else v for k, v in config.items()})


def as_dict(cfg):
    """The namespaces of a config as nested plain dicts."""
    return {k: as_dict(v) if isinstance(v, SimpleNamespace) else v for k, v in vars(cfg).items()}


def check_together(config):
    """Refuse values that cannot go together, whatever the data."""
    size, mae, fr = config['data']['size'], config['mae'], config['fr']
    c = config['reconstruct']
    for name, value, other, divisor in (
            ('data.size', size, 'mae.patch', mae['patch']),
            ('fr.batch', fr['batch'], 'fr.norm_batch', min(fr['norm_batch'], fr['batch']))):
        if value % divisor:
            raise InputError(f'{name} = {value} does not divide by {other} = {divisor}: change '
                             'one of them')
    if (c['method'] == 'facemae' and config['irm']['weight']
            and config['irm']['warmup_epochs'] >= mae['epochs']):
        raise InputError(f'irm.warmup_epochs = {config["irm"]["warmup_epochs"]:g} of mae.epochs = '
                         f'{mae["epochs"]:g}: relations would never act, and without them it is '
                         'no FaceMAE: lower it, or set irm.weight=0')
    for method, key, reach in (('blur', 'blur_sigma', 3 * c['blur_sigma'] + 1),
                               ('pixelate', 'pixelate_block', c['pixelate_block'])):
        if method == c['method'] and reach > size:
            raise InputError(f'reconstruct.{key} = {c[key]:g} reaches over {reach:g} pixels, and '
                             f'data.size = {size}: give a smaller one')


@dataclass
class Variant:
    """A row of a comparison with one seed, and where its files lie: those of the method itself
    with run.seed in the run folder, others in sub-folders of it."""
    name: str                 # of the row, as tables show it
    seed: int                 # run.seed of this repetition
    cfg: SimpleNamespace      # resolved for the row
    seed_folder: str          # '' for the run's own seed, else 'seed1' and so on

    def __post_init__(self):
        self.run = Path(self.cfg.run.folder)                            # folder of the whole run
        self.folder = self.run / self.cfg.run.row / self.seed_folder    # of this row and seed
        # In logs and sentences: '' for the method itself, else 'mask' or 'mask/seed1'
        self.label = str(self.folder.relative_to(self.run)).removeprefix('.')
        self.release = self.folder / 'reconstructed'       # folder of the released data set
        self.student = self.folder / 'fr.pt'               # the recogniser that learns from it
        self.results = self.folder / 'results.json'

    def mae(self, k):
        """Checkpoint of the masked autoencoder of fold k."""
        name = '_'.join(filter(None, [self.cfg.mae.name, self.seed_folder]))
        return self.run / f'fold{k}' / f'{name}.pt'


def variants(cfg, compare):
    """The Variants of a run: the row of run.row, or, with `compare`, every row and seed."""
    names = ['', *cfg.compare] if compare else [cfg.run.row]
    if compare and cfg.reconstruct.method in cfg.compare:
        raise InputError(f'compare has a row {cfg.reconstruct.method!r}, the name that the method '
                         'has in the table: rename the row, or set another reconstruct.method')
    every = []
    for seed in (compare and cfg.compare_seeds) or [cfg.run.seed]:
        for name in names:
            if name and name not in cfg.compare:
                raise InputError(f'run.row = {quoted(name)} is no row: compare has '
                                 f'{list(cfg.compare)}')
            config = config_of_row(as_dict(cfg), name) if name else copy.deepcopy(as_dict(cfg))
            config['run'].update(seed=seed, row=name)
            if config['reconstruct']['mask_ratio'] == 'same':
                config['reconstruct']['mask_ratio'] = config['mae']['mask_ratio']
            check_together(config)
            every.append(Variant(name or config['reconstruct']['method'], seed, namespace(config),
                                 '' if seed == cfg.run.seed else f'seed{seed}'))
    return every
