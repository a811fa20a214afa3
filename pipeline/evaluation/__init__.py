"""Scores of samples and reconstructions, and the report that shows them."""
