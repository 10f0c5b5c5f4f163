"""What the model says: short greedy answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .editor import MendEditor
from .labels import encode_prompt, pad_token_id


@torch.no_grad()
def answer(editor: MendEditor, prompts: Sequence[str], max_new_tokens: int = 16) -> list[str]:
    """The model's greedy answers (edits attached or applied included), as text; a classifier's label."""
    model, tokenizer, config = editor.model, editor.tokenizer, editor.config
    texts = [config.prompt_template.replace("{prompt}", prompt) for prompt in prompts]
    if editor.kind == "classifier":
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt").to(editor.device)).logits
        if logits.shape[-1] == 1:
            return ["true" if z > 0 else "false" for z in logits[:, 0].tolist()]
        return [str(model.config.id2label[i]) for i in logits.argmax(-1).tolist()]
    answers = []
    for text in texts:  # one at a time: no padding to reason about, and the edits' own positions
        ids = encode_prompt(tokenizer, text, encoder_decoder=editor.kind == "encoder-decoder")
        inputs = torch.tensor([ids], device=editor.device)
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_token_id(tokenizer),
        )[0]
        start = 0 if editor.kind == "encoder-decoder" else len(ids)
        answers.append(tokenizer.decode(out[start:], skip_special_tokens=True).strip())
    return answers
