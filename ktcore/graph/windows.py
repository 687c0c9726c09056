"""Which layers of hub models have a sliding window, as the classes of transformers 5 read their configurations."""

from __future__ import annotations

from ktcore.graph.settings import Settings


def every_window(s: Settings) -> int:
    """A window for all layers wherever `sliding_window` holds one; 0 for none, and in GGUF."""
    return s.integer("sliding_window", "", least=0, without=0)


def switched_window(s: Settings) -> int:
    """Qwen's: `sliding_window`, but none unless `use_sliding_window` says so."""
    return every_window(s) if s.flag("use_sliding_window", "", without=False) else 0


def upper_window(s: Settings, layer: int) -> int:
    """Dense Qwen's: for the layers that `layer_types` marks, or else from `max_window_layers` on."""
    window, marked = switched_window(s), marked_sliding(s, layer)
    if marked is None:
        marked = bool(window) and layer >= s.integer("max_window_layers", "", least=0)
    return wide_enough(s, window, layer) if marked else 0


def wide_enough(s: Settings, window: int, layer: int) -> int:
    """`window`; ArchitectureError where it is 0 though the layer slides, of which transformers can make no mask."""
    if not window:
        raise s.error(
            f"layer_types gives layer {layer} a sliding window, but it has no width",
            "turn use_sliding_window on and give sliding_window a width, or name the layer 'full_attention'",
        )
    return window


def marked_sliding(s: Settings, layer: int) -> bool | None:
    """Whether `layer_types` of hub configs gives the layer a window; None where it is absent or empty."""
    kinds = s.sequence("layer_types")
    return (layer < len(kinds) and kinds[layer] == "sliding_attention") if kinds else None
