"""How long the trainings of a run will take, told before the first of them."""
import time
from pathlib import Path

import torch

import models
from facekit.base import process
from facekit.base.errors import counted
from facekit.data.batches import Order
from facekit.data.people import count_release
from facekit.privacy import protect

STEPS = 3     # of each size are timed
LONG = 0.2    # seconds of a step after which no larger one is timed


def remaining(folds, rows):
    """{checkpoint: (section of the config, images that its training takes)} of all that rows
    (Variants) still need: the images of each step, counted again in each."""
    needed = {}

    def add(path, section, c, count, batch):
        steps = Order(count, batch, 0, f'{section}.batch').steps(c.epochs)
        needed[path] = section, steps * batch

    for variant in rows:
        cfg = variant.cfg
        for fold in folds:
            for role in ('teacher', 'judge'):
                if not getattr(cfg, role).checkpoint:
                    add(Path(cfg.run.folder, f'fold{fold.k}', f'{role}.pt'), role,
                        getattr(cfg, role), len(fold.train), cfg.fr.batch)
            if cfg.reconstruct.method == 'facemae':
                add(variant.mae(fold.k), 'mae', cfg.mae, len(fold.mae), cfg.mae.batch)
        add(variant.student, 'fr', cfg.fr, count_release(folds, cfg).images, cfg.fr.batch)
    return {path: work for path, work in needed.items() if not path.exists()}


def seconds_per_image(section, cfg, device):
    """Seconds that an image takes in a step of a training, with a new net of the shape that a
    section of the config gives it: the fastest of some steps, first of few images, as a batch of
    large nets takes minutes on a CPU."""
    if section == 'mae':
        batch, net = cfg.mae.micro_batch, protect.build_mae(cfg.mae, cfg.data.size)
    else:
        c = getattr(cfg, section)
        batch, net = cfg.fr.norm_batch, models.iresnet(c.depth, c.width, cfg.data.size, cfg.fr.dim)
    net.to(device, memory_format=torch.channels_last)
    count, seconds = 2, 0.0
    while seconds < LONG and count <= batch:
        x = torch.rand(count, 3, cfg.data.size, cfg.data.size, device=device)
        noise = torch.rand(count, (cfg.data.size // cfg.mae.patch) ** 2, device=device)
        arguments = (x, noise, cfg.mae.mask_ratio) if section == 'mae' else (x,)
        seconds = min(seconds_of_step(net, arguments, cfg.run.precision) for _ in range(STEPS))
        per_image = seconds / count
        count *= 4
    return per_image


def seconds_of_step(net, arguments, precision):
    """Seconds of one forward and backward pass of a net."""
    begin = time.perf_counter()
    with process.autocast(arguments[0].device, precision):
        output = net(*arguments)
    if isinstance(output, tuple):                              # an MAE's, with the mask
        output = output[0]
    loss = output.float().square().mean()
    loss.backward()
    loss.item()                                                # waits until the device is done
    return time.perf_counter() - begin


def say_forecast(cfg, folds, rows):
    """Say how many nets a run has still to train, and about how long that takes in one process:
    steps of untrained nets are timed. Relations cost a pass of the teacher's net in their
    share of the epochs; the class layer, releases and attacks are not counted."""
    needed, device = remaining(folds, rows), process.choose_device(cfg)
    if not needed:
        return
    process.say('timing the nets ...')
    torch.set_num_threads(cfg.run.threads or process.cores())
    sections = {section for section, _ in needed.values()}
    speed = {name: seconds_per_image(name, cfg, device)
             for name in sorted(sections | ({'teacher'} if 'mae' in sections else set()))}
    if 'mae' in speed and cfg.irm.weight:
        speed['mae'] += speed['teacher'] * (1 - cfg.irm.warmup_epochs / cfg.mae.epochs)
    seconds = sum(images * speed[section] for section, images in needed.values())
    minutes = max(1, round(seconds / 60))
    time_left = f'{minutes / 60:.0f} hours' if minutes > 90 else counted(minutes, 'minute')
    process.say(f'{counted(len(needed), "net")} to train, about {time_left} in one process; '
                'releases and attacks come on top')
