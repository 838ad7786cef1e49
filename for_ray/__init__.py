"""Find images by the objects in them, at billion scale, on your own Ray cluster."""

__version__ = "0.1.0"
