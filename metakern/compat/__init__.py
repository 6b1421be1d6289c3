"""The interfaces of learn2learn and higher, on metakern: code for either library runs with its imports changed."""

from metakern.compat import higher, learn2learn

__all__ = ["higher", "learn2learn"]
