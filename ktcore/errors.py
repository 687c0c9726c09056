"""Errors that a user can meet: each says what was wrong, where, and what to do next."""

from __future__ import annotations


class KtcoreError(Exception):
    """Base of every error ktcore raises on purpose; the command line prints it without a traceback.

    Args:
        message: what was wrong and where (file, node, rule), in one or two sentences.
        hint: what the user can do about it; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  {hint}")
        self.message = message
        self.hint = hint


class CheckpointError(KtcoreError):
    """A model file or folder is missing, damaged, or not what its header claims."""


class ArchitectureError(KtcoreError):
    """The checkpoint's architecture is unknown, or its configuration is not supported."""


class TokenizerError(KtcoreError):
    """Text was asked for, but the checkpoint has no tokenizer or one that ktcore cannot rebuild."""


class RuleError(KtcoreError):
    """A rule file is malformed, names something unknown, or holds a rule that can never fire."""


class BackendError(KtcoreError):
    """A backend is unknown, unavailable, incompatible or broken; the message carries the backend's own reason."""


class PlanError(KtcoreError):
    """No implementation can run a node, or the model does not fit the given memory."""


class RequestError(KtcoreError):
    """A generation request cannot be served: empty prompt, prompt longer than the context, bad sampling value."""


class ContextError(RequestError):
    """A prompt is longer than the context."""


class ExpertsError(KtcoreError):
    """Routed experts on the host failed (`__cause__` has what they raised, where that is known), or the hand-off to
    them was used wrongly."""


class LogitsError(KtcoreError, FloatingPointError):
    """What the model computed for an answer is not a number: the weights are damaged, or a value overflowed."""


class FieldError(RequestError):
    """A request's field holds what cannot be served.

    Args:
        param: the field's name.
    """

    def __init__(self, param: str, message: str, hint: str = "") -> None:
        super().__init__(f"{param}: {message}", hint)
        self.param = param
