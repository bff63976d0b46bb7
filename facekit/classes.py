"""The class layer of a recogniser, divided over the processes (Partial FC, arXiv 2203.15565).

Each process holds the centres of a share of the classes and sees the embeddings of all processes;
the softmax is exact across the shares, and only the gradients of embeddings travel back.
"""
import torch
import torch.distributed as dist
from torch import nn

import models
from facekit import batches, run


class DividedHead(models.MarginHead):
    """Of a MarginHead's class centres the share number share[0] of share[1], with its loss."""

    def __init__(self, dim, classes, loss='arcface', scale=64.0, gradient='exact', rate=1.0,
                 share=(0, 1)):
        super().__init__(dim, 0, loss, scale, gradient)
        self.rate, (self.rank, self.count) = rate, share
        self.bounds = [classes * r // self.count for r in range(self.count + 1)]
        self.first, self.end = self.bounds[self.rank:self.rank + 2]
        self.sampled = None        # int64, rising: centres of this step, counted from self.first
        # The numbers that a MarginHead draws, though no process holds all of them
        blocks = [torch.empty(min(4096, classes - start), dim).normal_(std=0.01)[
            max(self.first - start, 0):max(self.end - start, 0)].clone()
            for start in range(0, classes, 4096)]
        self.weight = nn.Parameter(torch.cat(blocks))

    def sample(self, start, labels):
        """Choose the centres of a step: those of `labels`, int64 numpy (N,), its global batch, and
        of the others the share `rate` by a hash of class number and `start`, a batches.stream() of
        the step: the same ones whatever the number of processes."""
        bits = batches.hashed(start, torch.arange(self.first, self.end), 1)[:, 0]
        keep = batches.uniform(bits) < self.rate
        keep[labels[(labels >= self.first) & (labels < self.end)] - self.first] = True
        keep[0] |= ~keep.any()                     # there is no softmax over no centre
        self.sampled = batches.to_device(keep.nonzero()[:, 0], self.weight.device)

    def forward(self, z, labels, margin=0.5):
        """Embeddings (n, dim) and labels (n,) of this process -> the cross-entropy of the N rows
        of all processes and their accuracy: scalars, the same on each."""
        if self.count > 1:
            z, labels = GatheredRows.apply(z), run.gathered(labels)
        here = (labels >= self.first) & (labels < self.end)           # (N,): whose centre is here
        column, weight = (labels - self.first).clamp(0, len(self.weight) - 1), self.weight
        if self.sampled is not None:
            column = torch.searchsorted(self.sampled, column).clamp(max=len(self.sampled) - 1)
            weight = weight.index_select(0, self.sampled)
        cosine = self.cosines(z, weight)                              # (N, centres)
        true = cosine.gather(1, column[:, None])                      # (N, 1)
        true = torch.where(here[:, None], self.with_margin(true, margin), true)
        logits = self.scale * cosine.scatter(1, column[:, None], true)
        total, true = logits.logsumexp(1), self.scale * true[:, 0] * here
        largest = torch.stack([total, logits.amax(1)]).detach()       # (2, N)
        if self.count > 1:     # the values of all shares, each with the gradient of the own one
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            sums = torch.stack([(total - largest[0]).exp(), true]).detach()
            dist.all_reduce(sums)
            value = largest[0] + sums[0].log()                    # its derivative is exp() below
            total = value + (total.detach() - value).exp() * (total - total.detach())
            true = sums[1] + (true - true.detach())
        return (total - true).mean(), (true >= largest[1]).float().mean()

    def converted(self, saved, change):
        """A checkpoint with what change() makes of the centres and of their momentum."""
        optimizer = saved['optimizer']
        last = optimizer['param_groups'][-1]['params'][-1]            # the centres
        moments = {name: change(value) if torch.is_tensor(value) else value
                   for name, value in optimizer['state'].get(last, {}).items()}
        return {**saved, 'head': {'weight': change(saved['head']['weight'])},
                'optimizer': {**optimizer, 'state': {**optimizer['state'], last: moments}}}

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


class GatheredRows(torch.autograd.Function):
    """run.gathered() with a gradient: the sum of what the processes have for the own rows, times
    their number, since the net's gradients are averaged later."""

    @staticmethod
    def forward(ctx, z):
        return run.gathered(z)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient * run.world()
        dist.all_reduce(gradient)
        return gradient.chunk(run.world())[run.rank()]
