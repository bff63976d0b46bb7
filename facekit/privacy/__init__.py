"""Protections, the release and its audit, and who attacks it."""
