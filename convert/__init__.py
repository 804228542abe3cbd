"""Official checkpoints to ours. Everything released is read as data; see `core/weights.py` for what is refused."""

from .load import from_official, is_official_folder, load_official

__all__ = ["from_official", "is_official_folder", "load_official"]
