"""Data, labels and batches of the tasks that an editor is trained and measured on."""

from .labels import collate, encode_pair, pad_token_id

__all__ = ["collate", "encode_pair", "pad_token_id"]
