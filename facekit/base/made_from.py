"""What a result was made from: kept in it, and compared before it is continued or used.

`made_from` is {what: text}: the settings that decide what the result is, and digests of the
images, nets and secret that went into it.
"""
import re

from facekit.base.config import CONFIGS, as_dict, namespace, resolve
from facekit.base.errors import InputError, quoted

# Keys that change how a thing is made but not what it is
HARMLESS = {'mae.micro_batch', 'reconstruct.batch', 'reconstruct.photos', 'reconstruct.key',
            'reconstruct.check', 'reconstruct.export', 'fr.shard_classes'}


def settings(cfg, keys):
    """{section.key: text} of what sections or keys of a config say, without what is HARMLESS."""
    config, found = as_dict(cfg), {}
    for key in keys:
        section, _, name = key.partition('.')
        names = [name] if name else sorted(config[section])
        found |= {f'{section}.{n}': repr(config[section][n]) for n in names}
    return {key: text for key, text in found.items() if key not in HARMLESS}


def differences(then, now):
    """What is another one now, a list of texts for a sentence; both {what: text}, `then` from a
    file, which can hold anything. A key that did not exist then equals its default."""
    differ, new = [], [what for what in now if what not in then and '.' in what]
    if new:
        then = settings(namespace(resolve(CONFIGS / 'casia.yaml')), new) | then
    for what, text in now.items():
        before = then.get(what)
        if before != text and re.fullmatch(r'[0-9a-f]{16,}', text):
            differ.append(f'another {what}')
        elif before != text:
            before, text = (value if isinstance(value, str) and len(value) <= 100 else
                            quoted(value) for value in (before, text))
            differ.append(f'another {what} ({before} then, {text} now)')
    return differ


def check_made_from(path, then, now, remedy):
    """Refuse the result at `path`, which was made from `then`, if that is not `now`."""
    if differ := differences(then, now):
        raise InputError(f'{path} was made with {", ".join(differ)}: change it back, or {remedy}')


def public_dict(cfg):
    """as_dict() for files that are shared: who asked to be left out is nobody's business, so that
    their number stands for their names; nor is where the secret lies."""
    config = as_dict(cfg)
    del config['reconstruct']['key']
    config['data']['exclude'] = len(cfg.data.exclude)
    return config
