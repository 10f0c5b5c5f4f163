"""Foreign formats in and out."""

from .mend_archive import load_mend_archive, save_mend_archive

__all__ = ["load_mend_archive", "save_mend_archive"]
