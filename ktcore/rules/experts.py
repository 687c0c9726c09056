"""The `experts` part of a rule: which experts live on the accelerator, which may be late, which are dropped."""

from __future__ import annotations

from dataclasses import dataclass

from ktcore.rules.located import Located

KEYS = ("on_device", "use", "device", "defer", "keep", "threshold")


@dataclass(frozen=True)
class ExpertPolicy:
    """How one layer's routed experts are treated beyond where their rule puts them. All off by default.

    Attributes:
        on_device: ids of the experts resident on `device`, or how many of the first ones.
        use: implementations for the resident ones; the first that can runs.
        device: where they live: "accelerator", "name" or "name:index".
        defer: experts a token, the lowest-weighted, whose output may land one layer late.
        keep: at most so many experts a token; 0 keeps all.
        threshold: experts below this share of a token's largest weight are dropped; 0 drops none.
    """

    on_device: tuple[int, ...] | int = ()
    use: tuple[str, ...] = ("reference.experts",)
    device: str = "accelerator"
    defer: int = 0
    keep: int = 0
    threshold: float = 0.0

    def resident(self, experts: int) -> tuple[int, ...]:
        """Ids of the resident experts among `experts`."""
        if isinstance(self.on_device, int):
            return tuple(range(min(self.on_device, experts)))
        return self.on_device

    def describe(self) -> str:
        """In a few words, for plans."""
        words = []
        if self.on_device:
            count = self.on_device if isinstance(self.on_device, int) else len(self.on_device)
            words.append(f"{count} on {self.device}")
        if self.defer:
            words.append(f"{self.defer} may be a layer late")
        if self.keep:
            words.append(f"at most {self.keep} a token")
        if self.threshold:
            words.append(f"weights from {self.threshold:g} of the largest")
        return ", ".join(words)


def parse_experts(source: Located) -> ExpertPolicy:
    """The policy from its mapping.

    Raises:
        RuleError: an unknown key or a value out of range, with file and line.
    """
    given = source.mapping("experts")
    for key, item in given.items():
        if key not in KEYS:
            raise item.where.error(f"experts has no key '{key}'", f"known: {', '.join(KEYS)}")
    policy = ExpertPolicy(
        on_device=_on_device(given["on_device"]) if "on_device" in given else (),
        use=given["use"].texts("use") if "use" in given else ExpertPolicy.use,
        device=given["device"].text("device") if "device" in given else ExpertPolicy.device,
        defer=_count(given["defer"], "defer") if "defer" in given else 0,
        keep=_count(given["keep"], "keep") if "keep" in given else 0,
        threshold=_share(given["threshold"]) if "threshold" in given else 0.0,
    )
    return policy


def _on_device(source: Located) -> tuple[int, ...] | int:
    if not isinstance(source.value, list):
        return _count(source, "on_device")
    ids = source.plain()
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids) or len(set(ids)) < len(ids):
        raise source.where.error("on_device lists expert ids: whole numbers from 0, each once")
    return tuple(ids)


def _count(source: Located, what: str) -> int:
    value = source.value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise source.where.error(f"{what} must be a whole number from 0, not {source.plain()!r}")
    return value


def _share(source: Located) -> float:
    value = source.value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise source.where.error(f"threshold must be a number from 0 to 1, not {source.plain()!r}")
    return float(value)
