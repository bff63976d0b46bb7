# SPDX-License-Identifier: MIT
"""Instance relation matching, the loss of FaceMAE (arXiv 2205.11090). May be copied alone.

The relations between the faces of a batch, as a frozen recogniser sees them, are to be the same
among the reconstructions as among the originals. We had only the paper's abstract, which fixes
no more than this idea; cosines or distances, the squared error, the mean over i != j and the
batch of all ranks are our choices. Relations do not change when all embeddings turn together:
the loss is blind to a common rotation and can be zero although no face matches its original.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def relations(z, kind='cosine'):
    """Relations (N, N) between embeddings z (N, d) of any norm, float32 (float64 if z is).

    kind 'cosine': Z Z^T of the L2-normalised rows, in [-1, 1]; 'centred': the same after their
    mean was taken away, so that a direction common to all does not count; 'l2': their Euclidean
    distances, in [0, 2]. ValueError for another kind.
    """
    kinds = 'cosine', 'centred', 'l2'
    if kind not in kinds:
        raise ValueError(f'unknown relation kind {kind!r}; use one of {kinds}')
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))
        if kind == 'centred':
            z = F.normalize(z - z.mean(0))
        cosine = z @ z.T  # (N, N)
        if kind != 'l2':
            return cosine
        # The clamp stops the gradient at distance zero, where the root's derivative is infinite
        return (2 - 2 * cosine).clamp(min=1e-12).sqrt()


def gather_rows(z):
    """z (n, d) of every rank -> (ranks * n, d) in rank order; z itself in a single process.

    Every rank must bring the same n. The gradient reaches the own rows only and is multiplied by
    the number of ranks, so that DDP's averaging gives the gradient of the one-process loss.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return z
    ranks = dist.get_world_size()
    parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, z.detach().contiguous())
    own = z.view_as(z)  # a new node, because a hook on z would scale its other gradients too
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * ranks)
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def irm_loss(z, z_rec, kind='cosine'):
    """Mean over i != j of (R_ij - R'_ij)^2 over the batch of all ranks, a scalar.

    z (n, d) originals, without gradient; z_rec (n, d) reconstructions in the same order. kind as
    in relations(), or 'direct', the control without relations: mean 1 - cos(z_i, z'_i), of the
    own rows alone. ValueError if the shapes differ or fewer than two instances come together.
    """
    if z.shape != z_rec.shape:
        raise ValueError(f'originals {tuple(z.shape)} and reconstructions {tuple(z_rec.shape)} '
                         f'differ in shape; pass both embeddings of the same batch')
    if kind == 'direct':
        return (1 - F.cosine_similarity(z.detach(), z_rec)).mean()
    z, z_rec = gather_rows(z.detach()), gather_rows(z_rec)  # (N, d)
    count = len(z)
    if count < 2:
        raise ValueError(f'a batch of {count} has no relations; use a batch size of 2 or more')
    difference = relations(z, kind) - relations(z_rec, kind)  # (N, N)
    # Relations are symmetric: the mean over i < j is the mean over i != j
    return difference.square().triu(1).sum() / (count * (count - 1) / 2)


def relation_correlation(z, z_rec, kind='cosine'):
    """Pearson correlation, a scalar in [-1, 1], of the relations i != j of z and z_rec (N, d).

    kind as in relations(); 'direct' means cosines. A diagnostic of one process: no rows are
    gathered. NaN if one side's relations are all equal.
    """
    kind = 'cosine' if kind == 'direct' else kind
    i, j = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
    pairs = torch.stack([relations(z, kind)[i, j], relations(z_rec, kind)[i, j]])  # (2, pairs)
    return torch.corrcoef(pairs)[0, 1]
