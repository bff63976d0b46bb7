"""What was made of people who are taken out of a run, and has to go with them."""
import shutil
from pathlib import Path

from facekit.base import process
from facekit.nets.weights import load_checkpoint

# What has figures, pictures or images of people: of each row, and of the whole run
OF_A_ROW = ('reconstructed', 'reconstructed.tmp', 'release.json', 'fr.pt', 'results.json',
            'measured.json', 'scores', 'embeddings.npz')
OF_THE_RUN = ('comparison.json', 'table.txt', 'tables.csv', 'report.html', 'figures',
              'log/evaluate', 'log/evaluate.jsonl', 'log/reconstruct', 'log/reconstruct.jsonl',
              'log/student', 'log/student.jsonl')


def rows_in(run):
    """The folders in a run folder that hold a row, whatever rows its config names now."""
    return sorted({path.parent for name in (*OF_A_ROW, 'external.json')
                   for path in Path(run).rglob(name)})


def results_of(run):
    """What is there of OF_A_ROW and OF_THE_RUN in a run folder, a list of paths, with what others'
    models and releases found on its photos."""
    rows = rows_in(run)
    paths = [row / name for row in rows for name in OF_A_ROW]
    paths += [path for row in rows for path in sorted(row.glob('external*'))]
    paths += [Path(run, name) for name in OF_THE_RUN]
    return [path for path in paths if path.exists()]


def nets_of_others(cfg, folds):
    """The checkpoints of a run that learnt from other images than are public in Folds now: maybe
    from who was taken out. No stage would use them."""
    return [path for fold in folds
            for path in sorted(Path(cfg.run.folder, f'fold{fold.k}').glob('*.pt'))
            if not fold.taught(load_checkpoint(path))]


def delete(paths):
    """Delete files and folders, and say so."""
    for path in paths:
        process.say(f'deletes {path}')
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
