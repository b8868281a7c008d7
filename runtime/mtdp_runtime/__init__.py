"""Opens whole-slide images, finds tissue, tiles it, and extracts features. Never imports torch."""

__version__ = "0.1.0"
