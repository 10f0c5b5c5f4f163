"""Every family of the installed transformers that can be made small, and what mendfast does with it.

    python -m tests.architectures --write docs/architectures.md
    python -m tests.architectures --only mixtral qwen2_moe
    python -m tests.architectures --check docs/architectures.md

The check runs one family after another, those of every kind in turn, for so many seconds, and compares what it found
with the file; it also reads the file for cells that say nothing.

Each model is built from its configuration alone, shrunk by the names of its numbers; nothing is downloaded. A cell is
"yes" where the step works and is right, else says why not.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

from mendfast import Edit, EditMemory, MendConfig, MendEditor
from mendfast.training import editor_loss

VOCAB, LIMIT_SECONDS, MOST_PARAMETERS, LEAST = 96, 40, 12_000_000, 60
KINDS = {
    "vision and text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
STEPS = ("edit", "attach = apply", "exact revert", "train", "sum", "memory")
SMALL = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim d_embed hidden_dim emb_dim "
    "projection_dim model_dim input_dim encoder_dim out_hidden_size output_dim lru_width embedding_dim",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dff d_inner "
    "feed_forward_size dim_ff ffn_size block_ff_dim feedforward_size mlp_hidden_size",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "intermediate_size_mlp moe_shared_expert_intermediate_size",
    4: "num_hidden_layers n_layer num_layers n_layers num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_encoder_attention_heads num_decoder_attention_heads depth mamba_n_heads "
    "mamba_num_heads linear_num_value_heads rotary_dim",
    2: "encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_key_value_heads num_experts_per_tok "
    "moe_top_k multi_query_group_num n_kv_heads moe_k linear_num_key_heads num_experts_per_token top_k_experts "
    "encoder_num_hidden_layers decoder_num_hidden_layers kv_n_heads",
    8: "head_dim d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim attention_head_size "
    "mamba_d_state state_size ssm_state_size linear_key_head_dim linear_value_head_dim global_head_dim "
    "hidden_size_per_layer_input mamba_d_head mamba_head_dim index_head_dim swa_head_dim",
    16: "q_lora_rank kv_lora_rank sliding_window window_size mamba_chunk_size chunk_size attention_window",
    1: "n_group topk_group first_k_dense_replace n_shared_experts n_groups mamba_n_groups num_shared_experts",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions "
    "max_target_positions max_sequence_length max_encoder_position_embeddings",
    96: "vocab_size vocab_size_per_layer_input encoder_vocab_size decoder_vocab_size text_vocab_size",
}  # fmt: skip
NUMBERS = {name: number for number, names in SMALL.items() for name in names.split()}
NEEDED = ("head_dim", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")  # though the default is None
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
# What the numbers' names don't tell.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "funnel": {"block_sizes": [2, 2], "d_head": 8},
    "dbrx": {"ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
             "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"expand": 1},
    "bamba": {"mamba_expand": 1},
    "granitemoehybrid": {"mamba_expand": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_expand": 1},
    "xlnet": {"d_head": 8},
    "mpt": {"max_seq_len": 64, "n_layers": 4},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "convbert": {"head_ratio": 1, "num_groups": 1},
}


# -- small models ------------------------------------------------------------------------------------------------------


def small_config(cls: type, model_type: str = "") -> Any:
    """The default configuration with its sizes made small, those of the models within it too."""
    default = cls()
    numbers: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, transformers.PretrainedConfig):
            numbers[name] = small_config(type(value), value.model_type).to_dict()
        elif name in NUMBERS and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            numbers[name] = min(value, NUMBERS[name])
        elif value is None and name in NEEDED:
            numbers[name] = NUMBERS[name]
        elif name in TOKENS:
            numbers[name] = TOKENS[name]
    if "kv_lora_rank" in vars(default) and "num_attention_heads" in numbers:  # latent attention: a head of keys each
        numbers["num_key_value_heads"] = numbers["num_attention_heads"]
    if "head_dim" in numbers and numbers.get("rotary_dim"):
        numbers["rotary_dim"] = 8
    numbers |= SPECIAL.get(model_type, {})
    config = cls(**numbers)
    if "mrope_section" in (getattr(cls, "ignore_keys_at_rope_validation", None) or ()):
        config.rope_parameters["mrope_section"] = [2, 1, 1]  # of half a head
    return config


def build(model_type: str, class_name: str, kind: str) -> nn.Module:
    """A small model with weights wide enough that outputs differ."""
    cls = getattr(transformers, class_name)
    config = small_config(cls.config_class or configuration_auto.CONFIG_MAPPING[model_type], model_type)
    if kind == "causal" and "is_decoder" in vars(config) and not config.is_encoder_decoder:
        config.is_decoder = True
    if kind == "causal" and config.is_encoder_decoder and "Conditional" not in class_name:
        config.is_decoder, config.is_encoder_decoder = True, False
    if kind == "classifier":
        config.num_labels = 3
    if getattr(config, "decoder_start_token_id", None) is None and config.is_encoder_decoder:
        config.decoder_start_token_id = TOKENS["decoder_start_token_id"]  # T5's comes from its checkpoints
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"its configuration leaves {count:,} parameters")
    torch.manual_seed(0)
    model = cls(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif not parameter.isfinite().all():
                parameter.fill_(1.0)
    return model


def batch_of(kind: str, seed: int = 0, size: int = 2) -> dict[str, torch.Tensor]:
    """Right-padded tokens, and labels on the last ones, of the decoder, or one per sample."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB - 6, (size, 8), generator=generator)
    mask = torch.ones_like(ids)
    ids[1::2, 7:], mask[1::2, 7:] = 0, 0
    if kind == "classifier":
        ids[::2, 7], ids[1::2, 6] = TOKENS["eos_token_id"], TOKENS["eos_token_id"]  # some read a text's last token
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(size) % 2}
    if kind == "encoder-decoder":
        labels = torch.randint(5, VOCAB - 6, (size, 4), generator=generator)
    else:
        labels = torch.where(mask.bool() & (torch.arange(8) > 3), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# -- what is asked of each ---------------------------------------------------------------------------------------------


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of as many words as the models know: w5, w6, ..."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCAB - 6)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            if "decoder_input_ids" in batch:
                batch = {name: value for name, value in batch.items() if name != "labels"}
            return model(**batch).logits
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To float32 of two different orders of summation, through some layers."""
    return bool((one - other).abs().max() <= 1e-4 * (1 + other.abs().max()))


def padding_moves(model: nn.Module, kind: str) -> bool:
    """Whether the model itself answers a text otherwise where padding follows it."""
    batch = {name: value[1:] for name, value in batch_of(kind).items()}  # whose last token is padding
    if kind == "encoder-decoder":
        read = torch.arange(5, 9).unsqueeze(0)
        read, longer = ({**batch, "decoder_input_ids": ids} for ids in (read, nn.functional.pad(read, (0, 1))))
        one, other = logits(model, read), logits(model, longer)
    else:
        one = logits(model, {name: value if value.dim() == 1 else value[:, :7] for name, value in batch.items()})
        other = logits(model, batch)
    return not close(one, other[:, : one.shape[1]])


def steps(model: nn.Module, kind: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """The name of each step, and what makes it: "yes" or why not."""
    batch, other = batch_of(kind), batch_of(kind, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    editor = MendEditor.from_model(model, None, MendConfig(rank=4, step_size=0.05))
    attached: list[torch.Tensor] = []
    edits: list[Edit] = []

    def untouched() -> bool:
        return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def edit() -> str:
        edits.append(editor.edit_tokens(batch))
        edits.append(editor.edit_tokens(other))
        if not untouched():
            return "the model changed"
        moved = [bool(u.any() and delta.any()) for u, delta, _ in edits[0].factors.values()]
        return "yes" if all(moved) else f"{len(moved) - sum(moved)} of {len(moved)} layers get no gradient"

    def attach() -> str:
        plain = logits(model, batch)
        with edits[0].attached(model):
            attached.append(logits(model, batch))
        edits[0].apply_(model)
        if close(attached[0], plain) and (attached[0] - plain).abs().max() < 1e-6:
            return "the edit changes nothing"
        return "yes" if close(attached[0], logits(model, batch)) else "they differ"

    def revert() -> str:
        edits[0].revert_(model)
        return "yes" if untouched() else "the bits differ"

    def train() -> str:
        inner, outer, loc = batch, batch_of(kind, 2), batch_of(kind, 3)
        editor.train()
        optimizer = torch.optim.SGD(editor.parameters(), 1e-2)
        total, parts = editor_loss(editor, inner, outer, loc)
        total.backward()
        optimizer.step()
        editor.eval()
        if not all(torch.isfinite(p).all() for p in editor.parameters()):
            return "the loss is not finite"
        with torch.no_grad():
            _, parts = editor_loss(editor, inner, outer, loc, joint=True)
        if kind != "classifier":
            with editor.edit_tokens(inner).attached(model):
                z, labels = logits(model, outer), outer["labels"]
            if kind == "causal":
                z, labels = z[:, :-1], labels[:, 1:]
            losses = zip(z, labels, strict=True)
            expected = torch.stack([nn.functional.cross_entropy(*one) for one in losses]).mean()
            if not close(parts["l_edit"], expected):
                return f"the loss is {parts['l_edit']:.4f}, that of the edited model {expected:.4f}"
        return "yes" if untouched() else "the model changed"

    def both() -> str:
        with Edit.sum(edits[:2]).attached(model):
            summed = logits(model, other)
        with edits[0].attached(model), edits[1].attached(model):
            return "yes" if close(summed, logits(model, other)) else "not that of both"

    def remember() -> str:
        with_words = MendEditor.from_model(model, words(), MendConfig(rank=4, step_size=0.05))
        prompts, targets = ["w10 w11 w12 w13", "w20 w21 w22 w23"], ["w40", "w41 w42"]
        if kind == "classifier":
            prompts, targets = [f"{prompt} </s>" for prompt in prompts], list(model.config.label2id)[:2]
        requests = list(zip(prompts, targets, strict=True))
        memory = EditMemory(with_words)
        keys = memory.add(requests)  # in one batch, the shorter one padded
        one, two = (with_words.edit(*request) for request in requests)
        with memory.attached():
            of_memory = logits(model, batch)
        with one.attached(model), two.attached(model):
            if not close(of_memory, logits(model, batch)):
                said = "answers of this model change with the padding beside them, and its edits too"
                return said if padding_moves(model, kind) else "not the two edits that it holds"
        memory.apply_()
        if not close(of_memory, logits(model, batch)):
            return "attached and applied differ"
        memory.remove(keys[0])
        memory.apply_()
        left = logits(model, batch)
        memory.revert_()
        with two.attached(model):
            if not close(left, logits(model, batch)):
                return "what was removed is not gone"
        return "yes" if untouched() else "the bits differ"

    yield from zip(STEPS, (edit, attach, revert, train, both, remember), strict=True)


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def reason(error: BaseException) -> str:
    if isinstance(error, _TooLong):
        return f"takes more than {LIMIT_SECONDS} s"
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    text = re.sub(r"\s+", " ", f"{kind}{error}").replace("|", "/").strip()
    text = re.sub(r"(/[\w.+-]+){3,}", "…", text)
    return text if len(text) <= 120 else text[:119] + "…"


def chosen(names: list[str]) -> str:
    """The default layers, blocks written as a range: "model.layers.1-3.mlp.{up,down}_proj"."""
    blocks: dict[str, dict[str, None]] = {}
    paths: dict[str, dict[str, None]] = {}
    for name in names:
        stack, number, path = re.match(r"(.*?)\.(\d+)\.(.*)\.weight$", name).groups()
        blocks.setdefault(stack, {})[number] = None
        paths.setdefault(stack, {})[path] = None
    return "; ".join(f"{stack}.[{' '.join(blocks[stack])}].({', '.join(paths[stack])})" for stack in blocks)


def row_of(model_type: str, class_name: str, kind: str) -> dict[str, str]:
    """One line of the table; "model" says why where it could not be built."""
    row = {"family": model_type, "class": class_name, "kind": kind}
    try:
        with limited(LIMIT_SECONDS):
            try:
                model = build(model_type, class_name, kind)
                if kind != "classifier":
                    kind = "encoder-decoder" if model.config.is_encoder_decoder else "causal"
                logits(model, batch_of(kind))
            except Exception as error:
                return {**row, "model": reason(error)}
            try:
                todo = list(steps(model, kind))
                row["layers"] = chosen(MendEditor.from_model(model, None, MendConfig(rank=1)).config.layers)
            except Exception as error:
                return {**row, "layers": reason(error)}
            for name, step in todo:
                try:
                    row[name] = step()
                except Exception as error:
                    row[name] = reason(error)
                    if name == "edit":
                        break
    except _TooLong as error:
        row.setdefault("layers", reason(error))
        row[next((name for name in STEPS if name not in row), STEPS[-1])] = reason(error)
    return row


def families() -> list[tuple[str, str, str]]:
    """(model type, class, kind) of all that the installed transformers has, each class once."""
    found: dict[tuple[str, str], str] = {}
    for kind, mapping in KINDS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault((name, "classifier" if kind == "classifier" else ""), f"{model_type}\n{kind}")
    return [(*value.split("\n")[:1], name, value.split("\n")[1]) for (name, _), value in found.items()]


# -- the table ---------------------------------------------------------------------------------------------------------


def line_of(row: dict[str, str]) -> str:
    cells = [row["family"], row.get("layers", "-"), *(row.get(step, "-") for step in STEPS)]
    return "| " + " | ".join(cells) + " |"


def in_turn(found: list[tuple[str, str, str]], start: int) -> list[tuple[str, str, str]]:
    """One of each kind after another, beginning at another place each time that ``start`` is another."""
    of_kind = {kind: [one for one in found if one[2] == kind] for kind in KINDS}
    of_kind = {kind: mine[start % len(mine) :] + mine[: start % len(mine)] for kind, mine in of_kind.items() if mine}
    return [mine[i] for i in range(len(found)) for mine in of_kind.values() if i < len(mine)]


def table(rows: list[dict[str, str]]) -> str:
    built = [row for row in rows if "model" not in row]
    whole = [row for row in built if all(row.get(step) == "yes" for step in STEPS)]
    lines = [
        "# Architectures",
        "",
        "Written by `python -m tests.architectures --write docs/architectures.md`, which builds every family of the "
        "installed transformers from its configuration, a few layers deep and with random weights, and edits it "
        "(without an image: those that see are asked text alone).",
        "",
        f"transformers {transformers.__version__}, PyTorch {torch.__version__.split('+')[0]}: {len(rows)} classes, "
        f"{len(built)} could be made small, {len(whole)} of them do everything.",
        "",
    ]
    for kind in KINDS:
        mine = sorted((row for row in built if row["kind"] == kind), key=lambda row: row["family"])
        if mine:
            lines += [f"## {kind.capitalize()} ({len(mine)})", "", "| family | default layers | " + " | ".join(STEPS)]
            lines[-1] += " |"
            lines.append("|---" * (2 + len(STEPS)) + "|")
        for row in mine:
            lines.append(line_of(row))
        lines += [""] if mine else []
    absent = sorted((row for row in rows if "model" in row), key=lambda row: (row["kind"], row["family"]))
    if absent:
        lines += ["## Not built", "", "Models that their configuration alone, shrunk, does not make run on tokens.", ""]
        lines += ["| family | class | why |", "|---|---|---|"]
        lines += [f"| {row['family']} | {row['class']} | {row['model']} |" for row in absent]
        lines.append("")
    return "\n".join(lines)


def faults(text: str) -> list[str]:
    """What a written table must not hold: fewer than 60 architectures, or a cell that says nothing or a raw error."""
    rows, head = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("| ") else []
        if cells[:1] == ["family"]:
            head = cells
        elif cells and "edit" in head:
            rows.append(cells)
    found = [] if len({cells[0] for cells in rows}) >= LEAST else [f"fewer than {LEAST} architectures"]
    for cells in rows:
        if len(cells) != len(head) or not all(cells):
            found.append(f"{cells[0]} has an empty cell")
            continue
        raw = [cell for cell in cells[1:] if re.match(r"[A-Z]\w*(Error|Exception): ", cell)]
        found += [f"{cells[0]} gives a raw error: {cell}" for cell in raw]
        said = cells[cells.index("-") - 1] if "-" in cells[1:] else "why not"
        found += [f"{cells[0]} stops without saying why"] if said in ("yes", "-") else []
    return found


def check(path: Path, seconds: float, start: int) -> list[str]:
    """Faults of the table in ``path``, and rows of it that are other ones now, as far as the seconds reach."""
    text, until, seen = path.read_text(encoding="utf-8"), time.monotonic() + seconds, dict.fromkeys(KINDS, 0)
    found = faults(text)
    for family in in_turn(families(), start):
        if time.monotonic() > until:
            break
        if f"| {family[1]} |" in text:  # among those that can't be built
            continue
        row = quietly(*family)
        seen[family[2]] += 1
        if "model" not in row and (line := line_of(row)) not in text and "takes more than" not in line:
            found.append(f"{path} does not hold what was found: {line}")
    print("tried again: " + ", ".join(f"{count} {kind}" for kind, count in seen.items()))
    return found


def quietly(*family: str) -> dict[str, str]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return row_of(*family)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare the table there with what some rows are now")
    parser.add_argument("--seconds", type=float, default=100, help="how long the check may take")
    parser.add_argument("--start", type=int, default=0, help="where among the families the check begins")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="these families alone")
    parser.add_argument("--kind", choices=list(KINDS), help="this kind alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("mendfast").setLevel(logging.ERROR)
    if args.check:
        found = check(args.check, args.seconds, args.start)
        print("\n".join(found) or f"{args.check} holds")
        return bool(found)
    rows = []
    for family in families():
        if args.only and family[0] not in args.only or args.kind and family[2] != args.kind:
            continue
        started = time.monotonic()
        rows.append(quietly(*family))
        said = {name: cell for name, cell in rows[-1].items() if cell != "yes" and name not in ("family", "kind")}
        print(f"{family[0]} ({family[2]}, {time.monotonic() - started:.1f} s): {said}", flush=True)
        if args.write:  # as it goes, so that a run that is stopped leaves what it has
            args.write.parent.mkdir(parents=True, exist_ok=True)
            args.write.write_text(table(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
