"""What the four stages of the kit share, in the order in which it is built.

start, errors, config, run, progress, files, images, records, bins, toy, sources, faces,
split, batches, classes, published, embed, training, keys, protect, verification, retrieval,
attack_data, mask_attacks, attacks, report, plots, page, check: a module imports only from those
before it.
"""
