"""The one exception that a user is meant to read, and what its sentences need."""
import importlib


class InputError(ValueError):
    """A wrong input: one sentence that names what, where and the remedy."""


def quoted(value):
    """A value as it is named in a sentence, shortened."""
    text = repr(value)
    return text if len(text) <= 100 else f'{text[:100]} ...'


def counted(number, thing):
    """'1 image' or '2 images'."""
    return f'{number} {thing}' + ('' if number == 1 else 's')


def printable(text):
    """`text` with control characters and undecodable bytes escaped: file names can hold both."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def optional(name, package):
    """An optional package, imported, or a sentence that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f'{name} is not installed: run `pip install {package}`, or leave out '
                         'what needs it') from None
