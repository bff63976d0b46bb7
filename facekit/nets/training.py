"""What both training scripts do around their own step: resume, update, log, save, stop.

The loop itself stays in the script.
"""
import math

import torch

from facekit.base import files, process
from facekit.base.errors import InputError
from facekit.base.launch import Stop
from facekit.base.log import StageLog
from facekit.base.made_from import check_made_from, public_dict
from facekit.nets.classes import DividedHead
from facekit.nets.weights import load_checkpoint, load_weights, save_checkpoint


class Training:
    """The state of one training between its steps, and what is due after each."""

    def __init__(self, cfg, path, stage, nets, optimizer, steps, batch, loss_names, device,
                 saved=None):
        """Begin, or continue from a checkpoint `saved`; path is the checkpoint's, stage the log's
        name, nets {key of the checkpoint: module}, batch that of all processes."""
        self.cfg, self.path, self.nets, self.optimizer = cfg, path, nets, optimizer
        self.steps, self.batch, self.loss_names = steps, batch, loss_names
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.run.precision == 'fp16')
        self.step = 0                                               # steps that were made
        self.logged = 0                                             # step of the last log line
        self.sums = torch.zeros(len(loss_names), device=device)     # of the losses since then
        self.learning_rate = 0.0                                    # of the last step
        self.divided_heads = [net for net in nets.values() if isinstance(net, DividedHead)]
        if saved:
            self.resume(saved)
        self.first_step = self.step                                 # of this process
        self.saved_at = 0.0                                         # seconds since the start
        self.log = StageLog(cfg.run.folder, stage, steps, self.step)
        self.stop = Stop()

    def resume(self, saved):
        """Continue from a checkpoint."""
        try:
            for head in self.divided_heads:
                saved = head.own_part(saved)
            for name, net in self.nets.items():
                load_weights(net, saved[name], self.path)
            self.optimizer.load_state_dict(saved['optimizer'])
            self.scaler.load_state_dict(saved['scaler'])
            self.sums.copy_(saved['sums'])
        except InputError:
            raise
        except Exception:                              # a file can hold anything
            raise InputError(f'{self.path} has a damaged optimizer, scaler or sums: delete it '
                             'and make it again') from None
        self.step, self.logged = saved['step'], saved['logged']
        process.say(f'continuing at step {self.step}')

    def backward(self, loss):
        """Accumulate the gradient of a loss, scaled where run.precision = fp16 needs it."""
        self.scaler.scale(loss).backward()

    def update(self, losses, learning_rate):
        """Take one step of the optimizer with the gradients that were accumulated; losses: float32
        (len(loss_names),) on the device, means of this process's images."""
        self.sums += losses
        self.learning_rate = learning_rate
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def log_due(self):
        """Whether the step just made ends with a log line."""
        return self.step % self.cfg.run.log_every == 0 or self.step == self.steps

    def write_log(self, inactive=(), **more):
        """Write the log line: mean losses since the last one, without those that are `inactive`,
        and `more` figures. Here the host waits for the device, for the first time since then."""
        means = (process.mean(self.sums) / (self.step - self.logged)).tolist()
        losses = dict(zip(self.loss_names, means))
        self.check_finite(losses)
        for name in inactive:
            losses[name] = None
        images = (self.step - self.first_step) * self.batch
        self.log(self.step, images, **losses, **more, lr=self.learning_rate)
        self.sums.zero_()
        self.logged = self.step

    def save_due(self):
        """Whether all processes save now: at the end, in time, or as one was asked to stop."""
        minutes = (self.log.seconds() - self.saved_at) / 60
        return self.stop.checkpoint_due(
            self.step == self.steps or minutes >= self.cfg.run.save_minutes)

    def save(self, **more):
        """Write the checkpoint, with `more` entries, and leave if the process was asked to."""
        self.saved_at, self.sums = self.log.seconds(), process.mean(self.sums)
        self.check_finite(dict(zip(self.loss_names, self.sums.tolist())))
        # The loss was of the weights before the last update; these are what is saved
        for name, net in self.nets.items():
            largest = torch.stack([p.detach().abs().amax() for p in net.parameters()]).amax()
            self.check_finite({f'a weight of {name}': process.mean(largest).item()})

        checkpoint = {
            **{name: net.state_dict() for name, net in self.nets.items()},
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'step': self.step,
            'steps': self.steps,
            'logged': self.logged,
            'sums': self.sums,
            'config': public_dict(self.cfg),
            **more,
        }
        for head in self.divided_heads:
            checkpoint = head.with_all_classes(checkpoint)
        save_checkpoint(self.path, checkpoint)
        self.stop.leave_if_requested()

    def check_finite(self, values):
        """Stop when a loss or weight is no number any more; the last checkpoint stays as it is."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            section, before = 'fr', f'delete {self.path} and train it anew'
            if 'model' in self.nets:
                section, before = 'mae', 'train another one, mae.name=NAME,'
            raise InputError(f'{" and ".join(bad)} became {values[bad[0]]} at step {self.step}, '
                             f'and {self.path} stays as it was last saved: {before} with a '
                             f'smaller {section}.lr or a longer {section}.warmup_epochs')

    def end(self):
        """After the loop a signal ends the process at once again."""
        self.stop.end()


def load_unfinished(path, made_from, code, needs):
    """The checkpoint at `path` to continue from, or None; InputError if it lacks a key of `needs`
    or was made from something else (see made_from.py). A line warns if it was made by other code;
    `code`: made_by() of the stage."""
    if not process.broadcast(path.exists()):
        return None
    saved = load_checkpoint(path, needs=('step', 'steps', 'logged', 'sums', 'optimizer',
                                         'scaler', 'config', *needs))
    remedy = 'delete it and run the same command again'
    if 'model' in needs:
        remedy = 'train another one beside it, mae.name=NAME'
    check_made_from(path, files.entry(saved, 'made_from'), made_from, remedy)
    before = files.entry(saved, 'made_by')
    if before.get('code') != code['code']:
        process.say(f'warning: {path} was made by other code (commit {before.get("commit")} then, '
                    f'{code["commit"]} now) and is used as it is: delete it to make it again')
    if not 0 <= saved['logged'] <= saved['step']:
        raise InputError(f'{path} has made {saved["step"]} steps and logged {saved["logged"]}: '
                         'delete it and make it again')
    return saved
