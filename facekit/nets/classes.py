"""The class layer of a recogniser, divided over the processes (Partial FC, arXiv 2203.15565).

Each process holds the centres of a share of the classes and sees the embeddings of all processes;
the softmax is exact across the shares, and only the gradients of embeddings travel back.
"""
import torch
import torch.distributed as dist
from torch import nn

import models
from facekit.base import process
from facekit.data import batches
from irm import gather_rows

BLOCK = 4096      # centres that are drawn at a time


def summed(gradient):
    """The sum of what the processes have for the rows of all of them."""
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient


class DividedHead(models.MarginHead):
    """A share of a MarginHead's class centres, with the loss of all of them."""

    def __init__(self, dim, classes, loss='arcface', scale=64.0, gradient='exact', rate=1.0,
                 share=(0, 1)):
        """share (r, n): the r-th of n equal parts of the classes; rate: the share of the other
        classes that a step samples, see sample()."""
        super().__init__(dim, 0, loss, scale, gradient)
        self.rate = rate
        self.rank, self.count = share
        self.bounds = [classes * r // self.count for r in range(self.count + 1)]
        self.first, self.end = self.bounds[self.rank], self.bounds[self.rank + 1]
        self.sampled = None        # int64, rising: centres of this step, counted from self.first
        self.weight = nn.Parameter(self.draw_centres(classes, dim))

    def draw_centres(self, classes, dim):
        """The own rows, float32 (own, dim), of what a MarginHead of all classes would draw, block
        by block: no process could hold them all."""
        own = []
        for start in range(0, classes, BLOCK):
            block = torch.empty(min(BLOCK, classes - start), dim).normal_(std=0.01)
            first, end = max(self.first - start, 0), max(self.end - start, 0)
            own.append(block[first:end].clone())       # a slice would keep the whole block alive
        return torch.cat(own)

    def sample(self, start, labels):
        """Choose the centres of a step: those of `labels`, int64 numpy (N,), its global batch, and
        of the others the share `rate` by a hash of class number and `start`, a batches.stream() of
        the step: the same ones whatever the number of processes."""
        bits = batches.hashed(start, torch.arange(self.first, self.end), 1)[:, 0]
        keep = batches.uniform(bits) < self.rate
        own = (labels >= self.first) & (labels < self.end)
        keep[labels[own] - self.first] = True
        keep[0] |= ~keep.any()                         # there is no softmax over no centre
        self.sampled = batches.to_device(keep.nonzero()[:, 0], self.weight.device)

    def forward(self, z, labels, margin=0.5):
        """Embeddings (n, dim) and labels (n,) of this process -> the cross-entropy of the N rows
        of all processes and their accuracy: scalars, the same on each."""
        if self.count > 1:
            z, labels = gather_rows(z), process.gathered(labels)
            z.register_hook(summed)        # each process has the gradient of its own centres
        own = (labels >= self.first) & (labels < self.end)            # (N,): whose centre is here
        column = (labels - self.first).clamp(0, len(self.weight) - 1)
        weight = self.weight
        if self.sampled is not None:
            column = torch.searchsorted(self.sampled, column).clamp(max=len(self.sampled) - 1)
            weight = weight.index_select(0, self.sampled)

        cosine = self.cosines(z, weight)                              # (N, centres)
        true = cosine.gather(1, column[:, None])                      # (N, 1)
        true = torch.where(own[:, None], self.with_margin(true, margin), true)
        logits = self.scale * cosine.scatter(1, column[:, None], true)
        total = logits.logsumexp(1)                                   # (N,), of the own share
        true = self.scale * true[:, 0] * own                          # 0 on all other processes
        largest = logits.detach().amax(1)
        if self.count > 1:
            total, true, largest = self.over_all_shares(total, true, largest)
        return (total - true).mean(), (true >= largest).float().mean()

    @staticmethod
    def over_all_shares(total, true, largest):
        """Log-sum-exp, true logit and largest logit (N,) of the own share -> of all classes, with
        the gradient of the own share's part."""
        most = torch.stack([total.detach(), largest])                 # (2, N)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        offset, largest = most
        sums = torch.stack([(total - offset).exp(), true]).detach()   # (2, N)
        dist.all_reduce(sums)
        value = offset + sums[0].log()
        # d value / d total is exp(total - value), the own share's part of the probability
        total = value + (total.detach() - value).exp() * (total - total.detach())
        true = sums[1] + (true - true.detach())
        return total, true, largest

    def own_part(self, checkpoint):
        """A checkpoint of all classes with the centres of this share alone."""
        return self.with_centres(checkpoint, lambda rows: rows[self.first:self.end].clone())

    def with_all_classes(self, checkpoint):
        """A checkpoint of this share with the centres of all classes, on rank 0; all processes
        must call it."""
        return self.with_centres(checkpoint, self.whole)

    @staticmethod
    def with_centres(checkpoint, change):
        """A checkpoint with what change() makes of the centres and of their momentum."""
        optimizer = checkpoint['optimizer']
        last = optimizer['param_groups'][-1]['params'][-1]            # number of the centres
        moments = dict(optimizer['state'].get(last, {}))
        for name, value in moments.items():
            if torch.is_tensor(value):
                moments[name] = change(value)
        state = {**optimizer['state'], last: moments}
        return {**checkpoint, 'head': {'weight': change(checkpoint['head']['weight'])},
                'optimizer': {**optimizer, 'state': state}}

    def whole(self, rows):
        """The rows of all classes from each share's own, on rank 0 and the CPU; elsewhere the own
        ones. All processes must call it."""
        if self.rank:
            dist.send(rows.contiguous(), 0)
            return rows
        parts = [rows.cpu()]
        for r in range(1, self.count):
            part = rows.new_empty(self.bounds[r + 1] - self.bounds[r], rows.shape[1])
            dist.recv(part, r)
            parts.append(part.cpu())
        return torch.cat(parts)
