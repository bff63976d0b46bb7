"""What the four stages of the kit share, in the order in which it is built.

errors, config, run, progress, files, records, toy, faces, batches, embed, training, protect,
verification, attack_data, attacks, report: a module imports only from those before it.
"""
