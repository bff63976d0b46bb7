"""What was made of people who are taken out of a run, and has to go with them."""
import copy
import shutil
from pathlib import Path

from facekit.base import process
from facekit.data.names import MEMORY
from facekit.data.people import make_folds
from facekit.nets.weights import load_checkpoint

# What has figures, pictures or images of people, with what a killed process left of it: of each
# row, and of the whole run. What is external was found with others' models and releases
OF_A_ROW = ('reconstructed', 'release.json', 'fr.pt', 'results.json', 'measured.json', 'scores',
            'embeddings.npz', 'external.json', 'external_*', '*.tmp')
OF_THE_RUN = ('comparison.json', 'table.txt', 'tables.csv', 'report.html', 'figures',
              'looks/reconstructed-*', 'looks/*.tmp', 'log/evaluate', 'log/evaluate.jsonl',
              'log/reconstruct', 'log/reconstruct.jsonl', 'log/student', 'log/student.jsonl')


def rows_in(run):
    """The folders in a run folder that hold a row, whatever rows its config names now; links to
    other disks are followed."""
    return sorted({path.parent for name in OF_A_ROW for place in ('', '*/', '*/*/')
                   for path in Path(run).glob(place + name)})


def is_run(folder):
    """Whether a folder holds anything of a run: a row, a net, or whom it remembers."""
    nets_or_memory = [*Path(folder).glob('fold*/*.pt'), *Path(folder).glob(MEMORY)]
    return bool(rows_in(folder) or nets_or_memory)


def results_of(run):
    """What is there of OF_A_ROW and OF_THE_RUN in a run folder, a list of paths."""
    paths = {path: True for row in rows_in(run) for name in OF_A_ROW
             for path in sorted(row.glob(name))}
    return list(paths | {path: True for name in OF_THE_RUN for path in Path(run).glob(name)})


def nets_of_others(cfg, fold):
    """The checkpoints of a run that learnt from other images than are public now, in whichever
    fold: maybe from who was taken out. No stage would use them. fold: any Fold of the run."""
    cfg = copy.deepcopy(cfg)
    cfg.data.release_folds = []
    folds = {f'fold{each.k}': each for each in make_folds(fold.private, fold.public, cfg)}
    return [path for path in sorted(Path(cfg.run.folder).glob('fold*/*.pt'))
            if path.parent.name not in folds
            or not folds[path.parent.name].taught(load_checkpoint(path))]


def delete(paths):
    """Delete files and folders, and say so."""
    for path in paths:
        process.say(f'deletes {path}')
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)           # it may lie in a folder that has just gone
