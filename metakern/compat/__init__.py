"""The interfaces of learn2learn and higher on metakern: their users change an import."""

from metakern.compat import higher, learn2learn

__all__ = ["higher", "learn2learn"]
