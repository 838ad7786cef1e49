"""Readers of image collections with their categories, and the collection that the package draws itself."""
