"""What the four stages of the kit share, in the order in which it is built.

start, errors, config, made_from, run, progress, files, images, records, bins, toy, sources, faces,
split, batches, classes, published, embed, training, keys, protect, validation, verification,
attack_data, retrieval, mask_attacks, attacks, report, plots, page, check: a module imports only
from those before it.
"""
