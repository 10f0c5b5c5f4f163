"""Which matrices are edited where nobody names any: those of the last blocks' MLPs.

Never a router or a gate of a mixture of experts, never a vision or audio tower. Where a block's MLP is nothing but
routed experts, whose rows are a selection of the tokens, the attention's output projection stands in for it, and a
line of the log says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from .experts import problem
from .layers import Layer, expanded, is_matrix, named_layers, unwrapped, walk

log = logging.getLogger("mendfast")

LAST_BLOCKS = 3
LAST_BLOCKS_PER_STACK = 2  # encoder-decoders

_MIXING = re.compile(
    r"attn|attention|(^|[._])(self_)?att($|[._])|mamba|ssm|temporal_block|(^|[._])(short)?conv($|[._])"
)
_MIXING_CLASS = re.compile(r"Attention|Mamba|Mixer|ShortConv|DeltaNet|Recurrent|SelfAttn|mLSTM|sLSTM")
_GATE = re.compile(r"(^|[._])gate($|\.)|_gate($|\.)|router|gating")
_GATE_CLASS = re.compile(r"Router|TopKGat|TopkGat|MoEGate|MoeGate")
_ASIDE = re.compile(r"adapter|altup|laurel|per_layer|hyper|indexer|layernorm\.|(^|[._])hc_")
_EXPERTS = re.compile(r"(^|\.)(\w*_)?experts($|\.)")
_SENSES = re.compile(
    r"vision|visual|image|video|audio|speech|patch|pixel|vit($|\.)|vq|depth_decoder|codec|qformer|mtp|protein|resampler"
)
_OUTPUT = ("o_proj", "out_proj", "c_proj", "wo", "o", "out_lin", "dense", "proj", "out")


def experts_in(name: str) -> bool:
    """Whether a weight belongs to a routed expert that is called on a selection of the tokens, no telling which."""
    return re.search(r"(^|\.)(\w*_)?experts\.(\w*_)?\d+(\.|$)", name) is not None and "shared_experts" not in name


def stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The model's stacks of blocks, in order of registration: one, or an encoder's and a decoder's, or a tower's
    beside the text's."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in walk(model, enter=lambda module: all(module is not blocks for _, blocks in found)):
        if isinstance(module, nn.ModuleList) and len(module) and _alike(module):
            inside = any(module is m for _, blocks in found for _, m in walk(blocks))  # and here once more
            if not inside and any(is_matrix(m) for m in module.modules()):
                found.append((name, module))
    return found


def last_block(model: nn.Module, names: Iterable[str]) -> nn.Module | None:
    """The block after which a pass has run all weights of these names; None where they lie elsewhere than in the
    model's one stack, or where blocks are run several times."""
    found = stacks(model)
    if len(found) != 1 or getattr(model.config, "num_hidden_layers", None) != len(found[0][1]):
        return None
    (stack, blocks), last = found[0], 0
    for name in names:
        number = name.removeprefix(f"{stack}." if stack else "").partition(".")[0]
        if not name.startswith(f"{stack}." if stack else "") or not number.isdigit():
            return None
        last = max(last, int(number))
    run = {id(p) for block in blocks[: last + 1] for p in block.parameters()}
    shared = any(id(p) in run for block in blocks[last + 1 :] for p in block.parameters())
    return None if shared else blocks[last]


def frozen_ends(model: nn.Module, layers: Sequence[Layer]) -> list[list[nn.Module]]:
    """Of each stack the blocks whose outputs no edit of ``layers`` changes; where an encoder is edited, the decoder
    sees edited states and none of it is among them."""
    ends: list[list[nn.Module]] = []
    for name, blocks in stacks(model):
        edited = [
            int(layer.name[len(name) + 1 :].split(".")[0]) for layer in layers if layer.name.startswith(f"{name}.")
        ]
        if below := list(blocks)[: min(edited, default=len(blocks))]:
            ends.append(below)
        if edited:
            break
    return ends


def _alike(blocks: nn.ModuleList) -> bool:
    """One kind of block; or several (attention here, state space there), each of which is called one."""
    kinds = {type(block) for block in blocks}
    return len(kinds) == 1 or all(re.search(r"Layer$|Block$", kind.__name__) for kind in kinds)


def text_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Of :func:`stacks` those that read and write text: an encoder's and a decoder's, or the one before the head."""
    model = unwrapped(model)
    found = stacks(model)
    plain = [(name, blocks) for name, blocks in found if not _SENSES.search(name.lower())]
    found = plain or found
    if getattr(model.config, "is_encoder_decoder", False) or len(found) < 2:
        return found
    inside = found
    if hasattr(model, "get_decoder"):
        reached = {id(module) for module in model.get_decoder().modules()}
        inside = [(name, blocks) for name, blocks in found if id(blocks) in reached] or found
    return [max(inside, key=lambda stack: sum(p.numel() for p in stack[1].parameters()))]


def find_layers(model: nn.Module, names: Sequence[str] | None) -> list[Layer]:
    """The named weights, or those of :func:`choose_layers` for None. The name of a stack of experts,
    "….experts.down_proj", means all of them."""
    if names is None:
        return named_layers(model, choose_layers(model))
    return named_layers(model, [one for name in names for one in expanded(model, name)])


def choose_layers(model: nn.Module) -> list[str]:
    """Names of the MLP matrices of the last three blocks, or of the last two of each of an encoder-decoder's stacks.

    Raises:
        ValueError: no stack of blocks, or none that holds a matrix to edit.
    """
    found = text_stacks(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no stack of blocks to choose layers from; "
            "name the weights in MendConfig(layers=[...])."
        )
    last = LAST_BLOCKS if len(found) == 1 else LAST_BLOCKS_PER_STACK
    names = [name for stack, blocks in found for name in _of_stack(stack, blocks, last)]
    if not names:
        raise ValueError(
            f"The last blocks of {type(model).__name__} hold no matrices that mendfast knows to be an MLP's or an "
            "attention's output; name the weights in MendConfig(layers=[...])."
        )
    return names


def mlp_outputs(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Of every block of the text's (last) stack that has an MLP: the block, and the name of the MLP's last weight.

    Routed experts are left out, as everywhere here.
    """
    found = []
    for stack, blocks in text_stacks(model)[-1:]:
        for i, block in enumerate(blocks):
            if paths := list(_mlp(block)):
                found.append((block, f"{stack}.{i}.{paths[-1]}.weight" if stack else f"{i}.{paths[-1]}.weight"))
    return found


def blocks_of(model: nn.Module) -> list[tuple[str, list[tuple[int, list[str]]]]]:
    """Of each stack that reads and writes text: its name, and number and weights of each block that has any to edit."""
    found = []
    for stack, blocks in text_stacks(model):
        weights = _of_stack(stack, blocks, len(blocks))
        by_block: dict[int, list[str]] = {}
        for name in weights:
            number = int(name.removeprefix(f"{stack}." if stack else "").partition(".")[0])
            by_block.setdefault(number, []).append(name)
        if by_block:
            found.append((stack, sorted(by_block.items())))
    return found


def _of_stack(stack: str, blocks: nn.ModuleList, last: int) -> list[str]:
    # Blocks that read an image are passed over where there is none.
    reading = {i: block for i, block in enumerate(blocks) if "CrossAttention" not in type(block).__name__}
    mlps = {i: paths for i, block in reading.items() if (paths := list(_mlp(block)))}
    mixture = any(_holds_experts(block) for block in list(blocks)[-last:])
    chosen = mlps if max(mlps, default=-1) >= len(blocks) // 2 else {}  # a dense block at the bottom is not meant
    said = "what runs beside the routed experts is edited (shared experts, dense MLPs)"
    if not chosen:
        chosen = {i: paths for i, block in reading.items() if (paths := list(_output(block)))}
        said = "the output projections of the attention are edited instead"
        if chosen and not mixture:
            log.info("the blocks of %s hold no MLP: %s", stack, said)
    if chosen and mixture:
        log.info(
            "the blocks of %s are mixtures of experts, each of which sees a selection of the tokens: %s%s",
            stack, said, _in_their_place(reading, f"{stack}." if stack else ""),
        )  # fmt: skip
    prefix = f"{stack}." if stack else ""
    return [f"{prefix}{i}.{path}.weight" for i, paths in list(chosen.items())[-last:] for path in paths]


def _in_their_place(blocks: Mapping[int, nn.Module], prefix: str) -> str:
    """How to edit the experts themselves, where they can be."""
    for i, block in reversed(blocks.items()):
        for path, module in walk(block):
            for name, parameter in module._parameters.items():
                if name == "down_proj" and parameter is not None and parameter.dim() == 3 and not problem(module, name):
                    return f" (to edit the experts: MendConfig(layers=['{prefix}{i}.{path}.{name}']))"
    return ""


def _matrices(block: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, matrix, and the names of the classes around it within the block."""
    classes: dict[str, str] = {}
    for path, module in walk(block):
        if not path:
            continue
        above = classes.get(path.rpartition(".")[0], "")
        classes[path] = f"{above} {type(module).__name__}"
        if is_matrix(module):
            yield path, module, classes[path]


def _mlp(block: nn.Module) -> Iterator[str]:
    for path, module, classes in _matrices(block):
        low = path.lower()
        if _MIXING.search(low) or _MIXING_CLASS.search(classes) or _is_gate(low, module, classes):
            continue
        if not (_EXPERTS.search(low) and "shared" not in low or _ASIDE.search(low)):
            yield path


def _is_gate(path: str, module: nn.Module, classes: str) -> bool:
    return bool(_GATE.search(path) or _GATE_CLASS.search(classes)) or getattr(module, "out_features", 2) == 1


def _output(block: nn.Module) -> Iterator[str]:
    """The last matrix of each of the block's attentions (or state spaces) that is named as its output."""
    found: dict[str, str] = {}
    for path, _, classes in _matrices(block):
        low = path.lower()
        mixing = _MIXING.search(low) or _MIXING_CLASS.search(classes)
        if mixing and path.rpartition(".")[2] in _OUTPUT and not (_EXPERTS.search(low) or _ASIDE.search(low)):
            found[path.split(".")[0]] = path
    yield from found.values()


def _holds_experts(block: nn.Module) -> bool:
    for path, module in walk(block):
        if _EXPERTS.search(path) and "shared" not in path:
            return True
        if not isinstance(module, nn.Conv1d) and any(p is not None and p.dim() == 3 for p in module.parameters(False)):
            return True
    return False
