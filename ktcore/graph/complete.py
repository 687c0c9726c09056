"""Refuses models that would load but compute something else: tensors that no operator uses, settings nobody reads."""

from __future__ import annotations

import re
from collections import Counter

from ktcore.errors import CheckpointError
from ktcore.graph.node import Graph
from ktcore.graph.settings import Settings
from ktcore.weights.checkpoint import Checkpoint
from ktcore.weights.formats import is_readable
from ktcore.weights.joined import PREFIX

# (config.json key, GGUF key): what other families do, and members of these may one day do; 0, 1 and null mean "not"
UNREAD = (
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("logit_scale", "logit_scale"),
    ("logits_scaling", ""),
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("attention_multiplier", ""),
    ("clip_qkv", "attention.clamp_kqv"),
    ("alibi", "attention.max_alibi_bias"),
    ("use_parallel_residual", "use_parallel_residual"),
)
# by family, what it does do
DONE = dict.fromkeys(("gemma4", "gemma4_text"), ("final_logit_softcapping",))
LAYER = re.compile(r"(?:language_model\.model\.|model\.language_model\.|model\.|)(?:layers|blk)\.(\d+)\.")
FURTHER = "layers that predict further tokens"
COPIES = "copies of embedding and head in layers that predict further tokens"
COPY = re.compile(r"\.(?:embed_tokens|shared_head\.head|nextn\.embed_tokens|nextn\.shared_head_head)\.[a-z_]+$")
# derived values that older files hold, and the second of two layouts of the same projection
KNOWN_EXTRA = re.compile(r"rotary_emb\.inv_freq$|attn_rot_embd\.|attn_kv_b\.weight$")

# of checkpoints whose routed experts are taken from elsewhere, where the other's own graph has checked its tensors
EXPERTS = re.compile(r"\.experts\.|_exps\.|\.ffn_(?:gate|up|down)\.\d+\.")


def check_settings(settings: Settings) -> None:
    """Raises ArchitectureError when the configuration asks for something that its family here does not do."""
    done = DONE.get(settings.architecture, ())
    for hf, gguf in (keys for keys in UNREAD if keys[0] not in done):
        value = settings.given(hf, gguf)
        if value is not None and value is not False and value not in (0, 1):
            raise settings.error(
                f"{gguf if settings.gguf else hf} is {value!r}, which architecture '{settings.architecture}' "
                "is not known to do here",
                "this is a variant of the architecture; its numbers would come out wrong",
            )


def check_tensors(settings: Settings, graph: Graph) -> None:
    """Raises ArchitectureError when the checkpoint holds tensors that no operator uses and no rule leaves out."""
    used = {source for root in graph.roots() for ref in root.all_weights().values() for source in ref.sources}
    used.update(graph.read)
    unused = [
        name
        for name in settings.checkpoint.tensors
        if name not in used
        and not part_of(graph, name)
        and not KNOWN_EXTRA.search(name)
        and not (settings.experts is not None and (name.startswith(PREFIX) or EXPERTS.search(name)))
    ]
    if unused:
        rest = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
        raise settings.error(
            f"nothing uses tensors {', '.join(unused[:4])}{rest}: architecture '{settings.architecture}' has no such",
            "this is a variant of the architecture, or its configuration belongs to another model",
        )


def part_of(graph: Graph, tensor: str) -> str:
    """Which part of the checkpoint that is not run a tensor belongs to; "" for none."""
    found = LAYER.match(tensor)
    if found and int(found[1]) >= len(graph.layers):
        return COPIES if COPY.search(tensor) else "" if graph.further else FURTHER
    return next((part for start, part in graph.left_out.items() if tensor.startswith(start)), "")


def left_out(checkpoint: Checkpoint, graph: Graph) -> Counter[str]:
    """How many tensors of the checkpoint belong to each part that is not run."""
    parts = Counter(part_of(graph, tensor) for tensor in checkpoint.tensors)
    del parts[""]
    return parts


def check_formats(settings: Settings, graph: Graph) -> None:
    """Raises CheckpointError when a weight's format is known by its size only, so that loading could only fail."""
    for ref in (ref for root in graph.roots() for ref in root.all_weights().values()):
        if not is_readable(ref.stored or ref.format):
            where = settings.checkpoint.file_of(ref.sources[0])
            raise CheckpointError(
                f"{where}: tensor '{ref.sources[0]}' is {ref.stored or ref.format}, whose values nothing here can read",
                "take the model in another format: such types are for intermediate results, or too new",
            )
