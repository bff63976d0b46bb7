"""Foundations: config, processes, files, log. Nothing here knows about faces."""
