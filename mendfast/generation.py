"""What the model says: short greedy answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .editable import EditableModel
from .labels import encode_prompt, pad_token_id
from .objective import context_length


@torch.no_grad()
def answer(editor: EditableModel, prompts: Sequence[str], max_new_tokens: int = 16) -> list[str]:
    """The model's greedy answers (edits attached or applied included), as text; a classifier's label.

    Raises:
        ValueError: a prompt that fills the model's context, so that no token of an answer fits.
    """
    model, tokenizer, config = editor.model, editor.tokenizer, editor.config
    if editor.kind == "classifier":
        texts = [config.prompt_template.replace("{prompt}", prompt) for prompt in prompts]
        inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(editor.device)
        logits = model(**inputs).logits
        if logits.shape[-1] == 1:
            return ["true" if z > 0 else "false" for z in logits[:, 0].tolist()]
        return [str(model.config.id2label[i]) for i in logits.argmax(-1).tolist()]
    limit, answers = context_length(model), []
    # One at a time: no padding to reason about, and the edits' own positions.
    for text in map(editor.prompt_text, prompts):
        ids = encode_prompt(tokenizer, text, encoder_decoder=editor.kind == "encoder-decoder")
        room = max_new_tokens
        if limit is not None and editor.kind == "causal":
            room = min(room, limit - len(ids))
        if room < 1 or (limit is not None and len(ids) > limit):
            raise ValueError(f"The prompt has {len(ids)} tokens and the model takes {limit}; shorten it.")
        inputs = torch.tensor([ids], device=editor.device)
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=pad_token_id(tokenizer),
        )[0]
        start = 0 if editor.kind == "encoder-decoder" else len(ids)
        answers.append(tokenizer.decode(out[start:], skip_special_tokens=True).strip())
    return answers
