"""What the log of stage 1 watches: the relations of people who are in no training."""
from dataclasses import dataclass

import torch

from facekit.data import batches
from facekit.nets import embed
from facekit.privacy.protect import patch_noise
from irm import relation_correlation, relations


@dataclass
class ValidationBatch:
    """Images of people who are in no training, and how the teacher embeds them."""
    images: torch.Tensor      # uint8 (B, H, W, 3)
    noise: torch.Tensor       # int64 (B, L), fixed
    originals: torch.Tensor   # float32 (B, d), the teacher's embeddings

    @classmethod
    def of(cls, fold, teacher, cfg, device):
        """That of a Fold, or None if nobody was kept from training: its first 256 images, not a
        sample, so that people have several."""
        if not len(fold.validation):
            return None
        images = torch.from_numpy(fold.public.select(fold.validation[:256]).pixels()).to(device)
        seeds = batches.image_seeds(batches.stream(cfg.run.seed, 'validation masks'),
                                    torch.arange(len(images), device=device))
        noise = patch_noise(seeds, cfg)
        return cls(images, noise, embed.embed_batch(teacher, images, cfg.run.precision))

    @torch.no_grad()
    def figures(self, objective):
        """For the log: IRM; what it would be if the reconstructions were unrelated, where
        IRM alone tends to stall; correlation of the relations; mean cosine of a
        reconstruction with its original."""
        kind = objective.cfg.irm.relations
        if kind == 'direct':
            kind = 'cosine'
        z = objective.embeddings(self.images, self.noise)
        different = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        r, s = relations(self.originals, kind)[different], relations(z, kind)[different]
        return {'validation_irm': (r - s).square().mean().item(),
                'unrelated_irm': r.square().mean().item() + 1 / z.shape[1],
                'validation_relations': relation_correlation(self.originals, z, kind).item(),
                'validation_cosine': torch.cosine_similarity(self.originals, z).mean().item()}
