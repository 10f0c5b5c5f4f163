"""Labels for the tasks: :mod:`mendfast.labels`, which lies below because the editor needs it too."""

from ..labels import IGNORE, collate, encode_pair, pad_token_id

__all__ = ["IGNORE", "collate", "encode_pair", "pad_token_id"]
