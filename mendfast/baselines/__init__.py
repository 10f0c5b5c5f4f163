"""The systems that MEND is compared with."""

from .fine_tuning import FineTuning

__all__ = ["FineTuning"]
