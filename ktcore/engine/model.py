"""The Python API: load a checkpoint, then generate, stream, chat, or read logits."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import torch

from ktcore.engine.load.loader import Progress, load_modules
from ktcore.engine.load.packed_cache import load_cached
from ktcore.engine.output import PLAIN, Output
from ktcore.engine.prefix.cache import ON_DEVICE, PrefixOptions
from ktcore.engine.prefix.identity import prefix_identity
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.engine import Engine
from ktcore.engine.stream import TextStream, lookup
from ktcore.errors import RequestError, TokenizerError
from ktcore.ops.sampling import SamplingParams
from ktcore.rules.plan import Plan
from ktcore.rules.prepare import prepare
from ktcore.rules.taken import taken
from ktcore.text.chat_template import RESERVED
from ktcore.text.guides import Structures
from ktcore.text.open import load_tokenizer
from ktcore.text.tokenizer import Tokenizer
from ktcore.weights.checkpoint import Checkpoint

Message = dict[str, Any]


def load(
    path: str | Path,
    backend: str = "auto",
    rules: str | Path | None = None,
    threads: int | None = None,
    context: int | None = None,
    *,
    experts_from: str | Path | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    packed_cache: str | Path | None = None,
    graphs: bool = True,
    prefix: PrefixOptions | None = ON_DEVICE,
) -> Model:
    """Load a GGUF file or a Hugging Face folder.

    Args:
        backend: name of a backend; "auto" takes the accelerator if exactly one is there, else the host.
        rules: a rule file that goes before the shipped ones, or the name of a shipped one ("reference").
        threads: worker threads of the host backend; None takes the physical cores this process may use.
        context: tokens the KV cache holds; None takes the model's own, at most 16384.
        experts_from: another checkpoint of the same model, a GGUF file say, whose routed experts are taken instead.
        memory: bytes of accelerator memory to stay within; None takes what the device reports.
        progress: called with (node name, bytes loaded, bytes in all).
        packed_cache: a folder where packed weights are left, and mapped from when the same model is loaded with the
            same plan again; None keeps them in memory only.
        graphs: run whole decode steps as captured device graphs where device and plan allow it.
        prefix: prompts that begin alike share what was computed for them, on the device and in the further tiers that
            are named here; None computes every prompt anew.

    Raises:
        CheckpointError, ArchitectureError, RuleError, BackendError, PlanError: what is wrong, where, what to do.
    """
    experts = None if experts_from is None else Path(experts_from)
    prepared = prepare(Path(path), backend=backend, rules=rules, memory=memory, context=context, experts_from=experts)
    checkpoint, plan = prepared.checkpoint, prepared.plan
    try:
        if packed_cache is not None and prepared.packed is None:
            modules = load_cached(prepared, Path(packed_cache).expanduser(), threads, progress)
        else:
            modules = load_modules(plan, checkpoint, prepared.registry, threads, progress, packed=prepared.packed)
        size = context or plan.default_context()
        identity = "" if prefix is None or prefix.folder is None else prefix_identity(checkpoint, plan)
        engine = Engine(modules, size, plan.page_size, graphs=graphs, prefix=prefix, identity=identity)
        return Model(checkpoint, plan, engine, load_tokenizer(checkpoint), prepared.backend_reason)
    except BaseException:
        checkpoint.close()
        raise


class Model:
    """A loaded model. Use it in a with-statement, or call `close()`; one generation runs at a time.

    Attributes:
        plan: which implementation runs each part, and why.
        taken: the backend and the devices, and why; its text is what the command line says.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, engine: Engine, tokenizer: Tokenizer | None, backend_reason: str
    ) -> None:
        self.plan = plan
        self.taken = taken(plan, backend_reason)
        self.engine = engine
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            TokenizerError: it has none.
        """
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self._checkpoint.path} has no tokenizer, so it cannot take or give text",
                "call generate() or logits() with token ids, or add the tokenizer files to the checkpoint",
            )
        return self._tokenizer

    @cached_property
    def structures(self) -> Structures:
        """Makes forms that answers must have, such as a JSON schema; needs the package llguidance.

        Raises:
            TokenizerError: the checkpoint has no tokenizer.
        """
        return Structures(self.tokenizer, self.plan.graph.vocab)

    @property
    def checkpoint(self) -> Checkpoint:
        """The open file or folder."""
        return self._checkpoint

    @property
    def backend(self) -> str:
        """Name of the backend that was taken."""
        return self.taken.backend

    @property
    def device(self) -> str:
        """The backend's device, "name:index"; `taken.devices` has all that are in use."""
        return self.taken.device

    @property
    def why(self) -> str:
        """Why this backend was taken."""
        return self.taken.why

    @property
    def context(self) -> int:
        """Tokens that the KV cache holds."""
        return self.engine.context

    @property
    def quantization_error(self) -> dict[str, float]:
        """Operator -> relative error (root mean square, of all its weights) of what was quantised while loading."""
        return {op: loss.relative for op, loss in self.engine.model.losses.items()}

    @overload
    def generate(self, prompt: str, max_new_tokens: int = 64, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], max_new_tokens: int = 64, **options: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: torch.Tensor, max_new_tokens: int = 64, **options: Any) -> torch.Tensor: ...
    def generate(
        self, prompt: str | list[str] | torch.Tensor, max_new_tokens: int = 64, **options: Any
    ) -> str | list[str] | torch.Tensor:
        """Continue a prompt.

        Args:
            prompt: text; a list of texts, which run as one batch; or int64 ids [batch, seq].
            options: those of `ktcore.SamplingParams`, such as temperature (0 is greedy), top_p or seed; stop, a list of
                strings that end the answer; prompt_lookup, how many next tokens are guessed from the text so far (the
                answer is the same, sooner where it repeats the prompt).

        Returns:
            The new text, a list of new texts, or, as in transformers, ids [batch, seq + new] with the prompt in front
            and rows that ended early padded with their last id.
        """
        stop, params, output = _options(options)
        if isinstance(prompt, torch.Tensor):
            return self._generate_ids(prompt, max_new_tokens, params, output)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        streams = [TextStream(self, self.tokenizer.encode(p), max_new_tokens, params, stop, output) for p in prompts]
        with self._running():
            try:
                for stream in streams:
                    stream.begin()
                while any(s.active for s in streams) and self.engine.step():
                    for s in streams:
                        s.collect()
            finally:
                for stream in streams:
                    stream.close()
                self.engine.settle()
        for stream in streams:
            if stream.error is not None:
                raise stream.error
        texts = ["".join(s.drain()) for s in streams]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, max_new_tokens: int = 64, **options: Any) -> TextStream:
        """Like `generate` for one text, but an iterator of text pieces; its `stats` hold times afterwards."""
        stop, params, output = _options(options)
        return TextStream(self, self.tokenizer.encode(prompt), max_new_tokens, params, stop, output)

    def chat(self, messages: Seq[Message], max_new_tokens: int = 512, **options: Any) -> str:
        """Answer a conversation `[{"role": "user", "content": "…"}, …]` through the model's own chat template.

        Args:
            options: those of `stream_chat`.
        """
        return "".join(self.stream_chat(messages, max_new_tokens, **options))

    def stream_chat(
        self,
        messages: Seq[Message],
        max_new_tokens: int = 512,
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
        documents: Seq[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> TextStream:
        """Like `chat`, as an iterator of text pieces.

        Args:
            tools: JSON schemas of tools that the model may call, for templates that know them.
            documents: texts to answer from, for templates that know them.
            template: name of one of the checkpoint's chat templates, or a Jinja source.
            variables: further variables of the template, such as `{"enable_thinking": False}`.
            options: those of `generate`.

        Raises:
            TokenizerError: the checkpoint has no such chat template, or a broken one.
            RequestError: the template refuses these messages, or a variable has a name of the template's own.
        """
        stop, params, output = _options(options)
        named = dict(variables or {})
        taken = sorted(named.keys() & RESERVED)
        if taken:
            raise RequestError(
                f"{', '.join(taken)} cannot be a variable of the chat template", "it has its own meaning"
            )
        ids = self.tokenizer.encode_chat(list(messages), True, tools, documents, template, **named)
        return TextStream(self, ids, max_new_tokens, params, stop, output)

    def logits(self, ids: Seq[int] | torch.Tensor) -> torch.Tensor:
        """Logits float32 [tokens, vocab] of a sequence of token ids [tokens]; row i predicts token i + 1."""
        tokens = [int(i) for i in ids]
        self._check_ids(tokens)
        sequence = Sequence(tokens, SamplingParams(temperature=0), max_new_tokens=0, all_logits=True)
        with self._running():
            self._run([sequence])
        return torch.cat(sequence.logits)

    def close(self) -> None:
        """Release devices, memory and the file; calls after it are errors."""
        if not self._closed:
            self._closed = True
            self.engine.close()
            self._checkpoint.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"context of {self.context} tokens"
        return f"<ktcore.Model {self.plan.graph.architecture} from {self._checkpoint.path}, {state}. {self.taken}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _generate_ids(
        self, prompt: torch.Tensor, max_new_tokens: int, params: SamplingParams, output: Output
    ) -> torch.Tensor:
        if prompt.dim() != 2 or prompt.dtype not in (torch.int64, torch.int32):
            raise RequestError(f"ids must be int64 [batch, seq], not {prompt.dtype} {list(prompt.shape)}")
        stop_ids = self._tokenizer.stop_ids if self._tokenizer else frozenset()
        sequences = []
        for row in prompt.tolist():
            self._check_ids(row)
            sequences.append(Sequence(row, params, max_new_tokens, stop_ids, lookup=lookup(output)))
        with self._running():
            self._run(sequences)
        width = max((len(s.tokens) for s in sequences), default=0)
        rows = [s.tokens + s.tokens[-1:] * (width - len(s.tokens)) for s in sequences]
        return torch.tensor(rows, dtype=torch.int64)

    def _check_ids(self, tokens: Seq[int]) -> None:
        vocab = self.plan.graph.vocab
        bad = next((t for t in tokens if not 0 <= t < vocab), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside of the vocabulary of {vocab}")

    def _run(self, sequences: list[Sequence]) -> None:
        try:
            for sequence in sequences:
                self.engine.add(sequence)
            while self.engine.step():
                pass
            self.engine.settle()
        except BaseException:
            for sequence in sequences:
                self.engine.cancel(sequence)
            raise
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error

    def _running(self) -> threading.Lock:
        if self._closed:
            raise RequestError("the model is closed")
        return self._lock


def _options(options: dict[str, Any]) -> tuple[tuple[str, ...], SamplingParams, Output]:
    rest = dict(options)
    stop = rest.pop("stop", None) or ()
    output = replace(PLAIN, prompt_lookup=rest.pop("prompt_lookup", 0))
    known = set(SamplingParams.__dataclass_fields__)
    unknown = sorted(set(rest) - known)
    if unknown:
        raise RequestError(
            f"unknown option{'s' * (len(unknown) > 1)} {', '.join(unknown)}",
            f"known: {', '.join(sorted(known))}, stop, prompt_lookup",
        )
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return stops, SamplingParams(**rest), output
