"""One YAML file is one experiment: read, check, and override it from the command line.

configs/casia.yaml holds every key with its default and its meaning; another config names only what
differs. `resolve` gives nested dicts, `namespace` makes them `cfg.mae.lr`. A Variant is one row of
a comparison with one seed: its config and the paths of its files.
"""
import contextlib
import copy
import difflib
import os
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import yaml

from facekit.errors import InputError, quoted

# Names in a run folder, which no row of a comparison may have
RESERVED = 'fold', 'seed', 'figures', 'reconstructed', 'looks', 'faces', 'log'
# What rows cannot set: they share faces, split, teacher, judge and run folder
SHARED = 'data.', 'toy.', 'teacher.', 'judge.', 'run.'
CONFIGS = Path(__file__).parent.parent / 'configs'
CHOICES = {
    'stage': ('teacher', 'judge', 'student'),
    'run.device': ('auto', 'cpu', 'cuda'),
    'run.precision': ('bf16', 'fp16', 'fp32'),
    'data.on_size': ('refuse', 'resize'),
    'data.on_corrupt': ('stop', 'skip'),
    'mae.mse_on': ('all', 'hidden'),
    'irm.relations': ('cosine', 'centred', 'l2', 'direct'),
    'reconstruct.method': ('facemae', 'mask', 'blur', 'pixelate', 'noise', 'none'),
    'reconstruct.format': ('jpeg', 'png'),
    'evaluate.onnx_pixels': ('signed', 'bytes'),
    'fr.schedule': ('steps', 'cosine'),
    'fr.loss': ('arcface', 'cosface'),
    'fr.shard_classes': ('auto', 'true', 'false'),
    'fr.margin_gradient': ('exact', 'straight_through'),
}
INTEGERS = ('data.release_folds', 'compare_seeds')     # lists that begin empty
# Upper limits of numbers that RANGES does not name; their lower limit is 0
MAX_FLOAT, MAX_INT = float('inf'), (1 << 31) - 1
RANGES = {
    **dict.fromkeys((
        'run.log_every', 'data.folds', 'data.min_images', 'mae.micro_batch',
        'reconstruct.batch', 'evaluate.batch', 'evaluate.attack_steps'), (1, MAX_INT)),
    **dict.fromkeys(('mae.batch', 'fr.batch', 'fr.norm_batch'), (2, MAX_INT)),
    **dict.fromkeys(('mae.lr', 'fr.lr', 'irm.weight', 'mae.mse_weight'), (0, 1e30)),
    **dict.fromkeys(('mae.warmup_epochs', 'fr.warmup_epochs', 'irm.warmup_epochs'), (0, 1e9)),
    **dict.fromkeys((
        'mae.dim', 'mae.heads', 'mae.decoder_dim', 'mae.decoder_heads', 'fr.width', 'fr.dim',
        'teacher.width', 'judge.width'), (1, 1 << 14)),
    **dict.fromkeys(('data.size', 'mae.patch', 'reconstruct.pixelate_block'), (1, 1 << 12)),
    **dict.fromkeys(('run.threads', 'mae.depth', 'mae.decoder_depth'), (0, 1 << 10)),
    **dict.fromkeys(('mae.epochs', 'fr.epochs', 'teacher.epochs', 'judge.epochs'), (1e-6, 1e9)),
    'fr.sample_rate': (1e-6, 1),
    'data.validation': (0, 0.9), 'mae.mask_ratio': (0, 0.99), 'reconstruct.mask_ratio': (0, 0.99),
    'reconstruct.blur_sigma': (0.1, 100), 'reconstruct.quality': (1, 100)}


class UniqueKeys(yaml.SafeLoader):
    """Plain values, without a key twice, of which YAML would keep the last one without a word, and
    without aliases, by which a few lines can stand for more than fits into memory."""

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


# Whole numbers are decimal: YAML 1.1 would read the name 010 as eight, and 12:30 as 750
INT = 'tag:yaml.org,2002:int'
UniqueKeys.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != INT]
    for first, resolvers in UniqueKeys.yaml_implicit_resolvers.items()}
UniqueKeys.add_implicit_resolver(INT, re.compile(r'[-+]?(0|[1-9][0-9]*)\Z'), '-+0123456789')


def read_yaml(path):
    """The mapping in a YAML file, read without constructing anything but plain values."""
    path = Path(path)
    if not os.path.isfile(path):           # False, too, for a path that no file can have
        near = [p for p in CONFIGS.glob('*.yaml') if p.stem == path.stem] or [
            f'configs/{name}.yaml' for name in sorted(p.stem for p in CONFIGS.glob('*.yaml'))]
        raise InputError(f'config {path} does not exist: name {" or ".join(map(str, near))}')
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), UniqueKeys)
    except Exception as e:                 # PyYAML raises of many kinds where a value has a tag
        raise InputError(f'config {path} is not YAML ({" ".join(str(e).split())[:200]}): write it '
                         'as configs/casia.yaml is written') from None
    if not isinstance(content, dict):
        raise InputError(f'config {path} holds no "section:" lines: see configs/casia.yaml')
    return content


def check_value(key, value, default):
    """`value` as the type of `default`, or an InputError that names the key and the remedy."""
    if key == 'reconstruct.mask_ratio':
        if value == 'same':
            return value
        default = 0.75
    if isinstance(default, float) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):   # YAML reads 1e-4 as text
            value = float(value)
    if isinstance(value, bool) and key in CHOICES:          # YAML reads true as no text
        value = str(value).lower()
    kind, example = type(default), [12, 40] if key == 'data.exclude' else default
    if type(value) is not kind:
        raise InputError(f'{key} = {quoted(value)} is a {type(value).__name__}: '
                         f'give a {kind.__name__}, for example {key}={example!r}')
    if isinstance(value, list) and key != 'data.exclude' and (default or key in INTEGERS):
        value = [check_value(key, item, 0 if key in INTEGERS else default[0]) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f'{key} = {value} is not finite: give a number such as {default}')
    low, high = RANGES.get(key, (0, MAX_INT if isinstance(value, int) else MAX_FLOAT))
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise InputError(f'{key} = {quoted(value)} is out of range: give {low} to {high}, for '
                         f'example {default}')
    if isinstance(value, str) and not (value.isprintable() and len(value) < 400):
        raise InputError(f'{key} = {quoted(value)} is too long or has characters that cannot be '
                         'printed: give another')
    if isinstance(value, str) and value.startswith('~/'):
        value = os.path.expanduser(value)
    if key == 'data.exclude' and not all(type(name) in (int, str) for name in value):
        raise InputError(f'{key} = {quoted(value)}: give the names of people, label numbers or '
                         'names of folders')
    if key == 'mae.name' and not re.fullmatch(r'[\w-]{1,60}', value):
        raise InputError(f'mae.name = {value!r} is a file name: use letters, digits, _ and -')
    if key == 'fr.margin_warmup' and isinstance(value, list) and len(value) != 2:
        raise InputError(f'{key} = {quoted(value)}: give the shares where it begins and ends')
    if key in CHOICES and value not in CHOICES[key]:
        raise InputError(f'{key} = {value!r} is unknown: choose from {", ".join(CHOICES[key])}')
    return value


def check_row(name, changes):
    """The changes of one row of the comparison, whose name becomes a folder."""
    if not re.fullmatch(rf'(?!{"|".join(RESERVED)})[\w-]{{1,60}}', str(name)):
        raise InputError(f'compare has a row {quoted(name)}: use letters, digits, _ and -, and do '
                         f'not begin with {", ".join(RESERVED)}')
    if not isinstance(changes, list) or not all(isinstance(c, str) for c in changes):
        raise InputError(f'compare.{name} = {quoted(changes)}: write a list of section.key=value')
    for change in changes:
        key = change.partition('=')[0]
        if key.startswith(SHARED) and key != 'teacher.checkpoint':
            raise InputError(f'compare.{name} sets {key}, which all rows share: set it for all, '
                             'or make another config')
    return changes


def check_reference(name, values):
    """The values of one row that others measured, in per cent, and their source: published
    accuracies by verification set, or, to repeat, [mean, standard deviation] of a row of this name
    by set, and as `person` and `photo` of the strongest attacker of each question."""
    def is_value(value):
        both = value if isinstance(value, list) and len(value) == 2 else [value]
        return all(type(x) in (int, float) for x in both)

    if not isinstance(values, dict) or 'source' not in values or not all(
            is_value(v) for key, v in values.items() if key != 'source'):
        raise InputError(f'reference.{name} = {quoted(values)}: write {{source: "paper, table", '
                         'lfw: 99.5}, or {source: "ours, three seeds", toy: [83.6, 0.7]}')
    return values


def overlay(config, changes, where):
    """Set the keys in `changes` (nested dict) in `config`, or say what is wrong in `where`."""
    try:
        set_keys(config, changes)
    except InputError as e:
        raise InputError(f'{where}: {e}') from None


def set_keys(config, changes):
    """Set the keys in `changes` in `config`; unknown keys and types are refused."""
    for section, content in changes.items():
        if section not in config:
            known = [f'{name}.{section}' for name, keys in config.items()
                     if isinstance(keys, dict) and section in keys]
            known = known or difflib.get_close_matches(str(section), config, 1) or sorted(config)
            raise InputError(f'key {quoted(section)} is unknown: did you mean '
                             f'{" or ".join(map(repr, known))}?')
        if section == 'compare' and isinstance(content, dict):
            config[section] = {str(name): check_row(name, row) for name, row in content.items()}
        elif section == 'reference' and isinstance(content, dict):
            config[section] = {str(name): check_reference(name, r) for name, r in content.items()}
        elif not isinstance(config[section], dict):
            config[section] = check_value(section, content, config[section])
        elif not isinstance(content, dict):
            raise InputError(f'{section} = {quoted(content)} is a section: set {section}.KEY')
        else:
            for key, value in content.items():
                if key not in config[section]:
                    near = difflib.get_close_matches(str(key), config[section], 1)
                    raise InputError(f'key {section}.{str(key)[:100]} is unknown: did you mean '
                                     + ' or '.join(near or sorted(config[section])) + '?')
                config[section][key] = check_value(f'{section}.{key}', value,
                                                   config[section][key])


def assign(config, assignment, where='command line'):
    """Apply one `section.key=value` of the command line or of a row."""
    name, equals, text = assignment.partition('=')
    if not equals:
        raise InputError(f'{where}: {quoted(assignment)} is not understood: write '
                         'section.key=value, for example mae.epochs=100')
    try:
        value = yaml.load(text, UniqueKeys) if text else ''
    except Exception:                      # as in read_yaml
        raise InputError(f'{where}: {quoted(assignment)} gives no YAML value: quote it') from None
    if isinstance(value, str) and text.strip()[:1] not in ('"', "'"):
        value = text.strip()               # a path may hold " #", a comment in YAML
    for part in reversed(name.split('.')):
        value = {part: value}
    overlay(config, value, where)


def resolve(path, assignments=()):
    """Config file plus command line over the defaults of casia.yaml, as nested dicts."""
    chain = [(Path(path), read_yaml(path))]
    while chain[-1][1].get('base'):
        path = chain[-1][0].parent / check_value(f'{chain[-1][0]}: base', chain[-1][1]['base'], '')
        if len(chain) > 8:
            raise InputError(f'config {path}: base leads round in a circle: remove one of them')
        chain.append((path, read_yaml(path)))
    config = read_yaml(CONFIGS / 'casia.yaml')
    for path, changes in reversed(chain):
        overlay(config, changes, path)
    for assignment in assignments:
        excluded = config['data']['exclude']
        assign(config, assignment)
        if missing := [name for name in excluded if name not in config['data']['exclude']]:
            raise InputError(f'{assignment}: this leaves out {quoted(missing[0])}, excluded by '
                             'the config or before: name everybody who shall be excluded')
    config['run']['folder'] = config['run']['folder'] or f'runs/{chain[0][0].stem}'
    config['base'], config['run']['config'] = '', str(chain[0][0])
    return config


def namespace(config):
    """Nested dicts as namespaces; `as_dict` is the way back."""
    return SimpleNamespace(**{
        k: namespace(v) if isinstance(v, dict) and k not in ('compare', 'reference') else v
        for k, v in config.items()})


def as_dict(cfg):
    """The namespaces of a config as nested plain dicts."""
    return {k: as_dict(v) if isinstance(v, SimpleNamespace) else v for k, v in vars(cfg).items()}


def check_together(config):
    """Refuse values that cannot go together, whatever the data."""
    size, mae, fr = config['data']['size'], config['mae'], config['fr']
    c, group = config['reconstruct'], config['irm']['images_per_identity']
    wrong = [
        (mae['norm_pix_loss'], 'mae.norm_pix_loss = true makes a model that cannot reconstruct: '
         'undoing it needs the hidden pixels and would leak them; leave it false'),
        (size % mae['patch'], f'mae.patch = {mae["patch"]} does not divide data.size = {size}: '
         'choose one that does'),
        (group and mae['batch'] % max(group, 1), f'mae.batch = {mae["batch"]} does not divide by '
         f'irm.images_per_identity = {group}: change one of them'),
        (fr['batch'] % min(fr['norm_batch'], fr['batch']), f'fr.batch = {fr["batch"]} does not '
         f'divide by fr.norm_batch = {fr["norm_batch"]}: change one of them'),
        (c['method'] == 'blur' and math.ceil(3 * c['blur_sigma']) >= size,
         f'reconstruct.blur_sigma = {c["blur_sigma"]:g} blurs over more than the {size} pixels of '
         f'a face: give less than {size / 3:g}'),
        (c['method'] == 'pixelate' and c['pixelate_block'] > size,
         f'reconstruct.pixelate_block = {c["pixelate_block"]} is larger than the {size} pixels of '
         'a face: give less'),
        (0 < config['evaluate']['probes'] < 16, 'evaluate.probes is under 16, of which no share '
         'can be told: give more, or 0 for all')]
    for is_wrong, sentence in wrong:
        if is_wrong:
            raise InputError(sentence)


@dataclass
class Variant:
    """A row of a comparison with one seed: its config, and where its files lie.

    The method itself with run.seed lies in the run folder, other rows and seeds in sub-folders of
    it, so that all share teacher and judge.
    """
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
                raise InputError(f'run.row = {name!r} is no row: compare has {list(cfg.compare)}')
            config = copy.deepcopy(as_dict(cfg))
            for change in cfg.compare[name] if name else []:
                assign(config, change, f'{cfg.run.config}: compare.{name}')
            config['run'].update(seed=seed, row=name)
            if config['reconstruct']['mask_ratio'] == 'same':
                config['reconstruct']['mask_ratio'] = config['mae']['mask_ratio']
            check_together(config)
            every.append(Variant(name or config['reconstruct']['method'], seed, namespace(config),
                                 '' if seed == cfg.run.seed else f'seed{seed}'))
    return every
