"""The jobs: for each one the order of its stages, and what stands between them."""
