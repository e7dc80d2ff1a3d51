"""One shard on one device -> rows. Imports models, pruners and storage."""

from workers.networks import load_network

__all__ = ["load_network"]
