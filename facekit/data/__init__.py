"""From a file to a batch: images, records, pairs, faces, who is public and who private."""
