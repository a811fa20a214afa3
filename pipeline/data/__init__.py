"""From images to WebDataset shards, and from shards to batches in a reproducible order."""
