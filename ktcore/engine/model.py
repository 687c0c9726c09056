"""The Python API: load a checkpoint, then generate, stream, chat, or read logits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import torch

from ktcore.engine.draft.asked import read_draft
from ktcore.engine.draft.load import load_drafting
from ktcore.engine.load.asked import Memory, check_asked, read_memory
from ktcore.engine.load.loader import Progress, load_modules
from ktcore.engine.load.packed_cache import load_cached
from ktcore.engine.load.room import check_room
from ktcore.engine.options import Options, read_options
from ktcore.engine.prefix.cache import ON_DEVICE, PrefixOptions
from ktcore.engine.prefix.identity import prefix_identity
from ktcore.engine.prompts import Form, Prompts, read_prompts
from ktcore.engine.schedule.sequence import Sequence
from ktcore.engine.step.engine import Engine
from ktcore.engine.stream import TextStream, guessing
from ktcore.errors import RequestError, TokenizerError
from ktcore.ops.sampling import SamplingParams
from ktcore.rules.plan import Plan
from ktcore.rules.prepare import prepare
from ktcore.rules.taken import taken
from ktcore.text.chat_template import RESERVED
from ktcore.text.guides import Structures
from ktcore.text.messages import check_messages
from ktcore.text.open import load_tokenizer
from ktcore.text.tokenizer import Tokenizer
from ktcore.weights.checkpoint import Checkpoint

Message = dict[str, Any]
CHAT_TOKENS = 512
"""Most new tokens of a chat's answer where nobody says."""


def load(
    path: str | Path,
    backend: str = "auto",
    rules: str | Path | None = None,
    threads: int | None = None,
    context: int | None = None,
    *,
    experts_from: str | Path | None = None,
    memory: Memory | None = None,
    progress: Progress | None = None,
    packed_cache: str | Path | None = None,
    graphs: bool = True,
    prefix: PrefixOptions | None = ON_DEVICE,
    packing: str | None = None,
    draft: str | Path | None = None,
) -> Model:
    """Load a GGUF file or a Hugging Face folder.

    Args:
        backend: name of a backend; "auto" takes the accelerator if exactly one is there, else the host.
        rules: a rule file that goes before the shipped ones, or the name of a shipped one ("reference").
        threads: worker threads of the host backend; None takes the physical cores this process may use.
        context: tokens the KV cache holds; None takes the model's own, at most 16384.
        experts_from: another checkpoint of the same model, a GGUF file say, whose routed experts are taken instead.
        memory: accelerator memory to stay within, in bytes or words like "24GiB", or by device: `{"cpu": "64GiB"}`;
            None takes what the device reports.
        progress: called with (node name, bytes loaded, bytes in all).
        packed_cache: a folder where packed weights are left, and mapped from when the same model is loaded with the
            same plan again; None keeps them in memory only.
        graphs: run whole decode steps as captured device graphs where device and plan allow it.
        prefix: prompts that begin alike share what was computed for them, on the device and in the further tiers that
            are named here; None computes every prompt anew.
        packing: "fast" lets weights take more memory where that buys speed, "compact" does not; None leaves it to the
            rules, which by themselves say compact.
        draft: what guesses next tokens, for the model to check several in one step (answers stay the same): "mtp:2" is
            the checkpoint's own layer for further tokens, two at once; or a path, "small.gguf:4", of a smaller model of
            the same vocabulary.

    Raises:
        RequestError: an argument is of another type.
        CheckpointError, ArchitectureError, RuleError, BackendError, PlanError: what is wrong, where, what to do.
    """
    check_asked(**locals())
    experts = None if experts_from is None else Path(experts_from)
    drafts = read_draft(draft)
    prepared = prepare(
        Path(path),
        backend=backend,
        rules=rules,
        memory=read_memory(memory),
        context=context,
        experts_from=experts,
        packing=packing,
        further=drafts is not None and drafts.path is None,
    )
    checkpoint, plan = prepared.checkpoint, prepared.plan
    try:
        size = context or plan.default_context()
        check_room(plan, prepared.registry, size, mapped=prepared.packed is not None or packed_cache is not None)
        if packed_cache is not None and prepared.packed is None:
            modules = load_cached(prepared, Path(packed_cache).expanduser(), threads, progress)
        else:
            modules = load_modules(plan, checkpoint, prepared.registry, threads, progress, packed=prepared.packed)
        tokenizer = load_tokenizer(checkpoint)
        drafting = None
        if drafts is not None:
            drafting = load_drafting(drafts, prepared, modules, tokenizer, size, threads)
        identity = "" if prefix is None or prefix.folder is None else prefix_identity(checkpoint, plan)
        engine = Engine(
            modules,
            size,
            plan.page_size,
            long_chunk=plan.step_tokens,
            graphs=graphs,
            prefix=prefix,
            identity=identity + (drafting.identity if drafting else ""),
            drafting=drafting,
        )
        return Model(checkpoint, plan, engine, tokenizer, prepared.backend_reason)
    except BaseException:
        checkpoint.close()
        raise


class Model:
    """A loaded model. Use it in a with-statement, or call `close()`. Streams that are read in turn share its steps.

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
        self._left: deque[TextStream] = deque()

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
    def generate(self, prompt: str, max_new_tokens: int | None = None, **options: Any) -> str: ...
    @overload
    def generate(self, prompt: list[str], max_new_tokens: int | None = None, **options: Any) -> list[str]: ...
    @overload
    def generate(self, prompt: list[int], max_new_tokens: int | None = None, **options: Any) -> list[int]: ...
    @overload
    def generate(self, prompt: torch.Tensor, max_new_tokens: int | None = None, **options: Any) -> torch.Tensor: ...
    @overload
    def generate(self, prompt: Any = None, max_new_tokens: int | None = None, **options: Any) -> Any: ...
    def generate(self, prompt: Any = None, max_new_tokens: int | None = None, **options: Any) -> Any:
        """Continue prompts; several run as one batch.

        Args:
            prompt: text; a list of texts; token ids as a list, as a list of lists, or as an integer tensor or NumPy
                array [seq] or [batch, seq]; or what a tokenizer returns, a mapping with input_ids and attention_mask.
                `generate(**tokenizer(...))` does the same. A batch may be padded on the left, as its mask says.
            max_new_tokens: longest answer; None takes 64.
            options: those of `ktcore.SamplingParams`, such as temperature (0 is greedy), top_p or seed; stop, a list of
                strings that end the answer; prompt_lookup, how many next tokens are guessed from the text so far (the
                answer is the same, sooner where it repeats the prompt); draft, how many the model's drafter
                guesses, 0 none, where it was loaded with one. Of transformers' names: do_sample (False is
                temperature 0; True refuses it, and keeps SamplingParams' own where none is given, 0.7), max_length,
                eos_token_id (instead of the model's own; None: nothing ends an answer), pad_token_id, and those that
                change nothing with the values given.

        Returns:
            For text the new text, without a stop string; for a list of texts a list of those. For token ids prompt and
            answer together, as in transformers, in the form that the prompt came in: a list [seq + new] or a list of
            such lists; a tensor, on the prompt's device, or an array, int64 [seq + new] or [batch, seq + new], padding
            in front included, rows that ended early filled with pad_token_id, or else with their last id. A mapping's
            form is that of its input_ids. The token that ended an answer is kept, a stop string's too.

        Raises:
            RequestError: the prompt is of another type, is empty or too long, holds an id that is no token or padding
                that is not on the left; an option is unknown or out of range; the model is closed.
        """
        prompts, asked = self._read(prompt, max_new_tokens, options)
        if prompts.form is Form.TEXT or asked.stop:
            streams = [self._stream(row, len(row), asked) for row in prompts.rows]
            self._finish(streams)
            if prompts.form is Form.TEXT:
                texts = ["".join(s.drain()) for s in streams]
                return texts if prompts.many else texts[0]
            return prompts.continued([stream.ids for stream in streams], asked.pad)
        ends = asked.output.ends(self._own_ends)
        sequences = [
            Sequence(row, asked.params, asked.room(len(given)), ends, **guessing(self.engine, asked.output))
            for row, given in zip(prompts.rows, prompts.given, strict=True)
        ]
        with self._running():
            self._run(sequences)
        return prompts.continued([s.new_tokens for s in sequences], asked.pad)

    def stream(self, prompt: Any = None, max_new_tokens: int | None = None, **options: Any) -> TextStream:
        """Like `generate` for one prompt of any of its kinds, but an iterator of text pieces, whatever the prompt is;
        its `ids` are the new ids so far, its `stats` hold times afterwards.

        Raises:
            RequestError: as `generate` does, or there are several prompts.
        """
        prompts, asked = self._read(prompt, max_new_tokens, options)
        return self._stream(prompts.one(), len(prompts.given[0]), asked)

    def chat(self, messages: Seq[Message], max_new_tokens: int | None = None, **options: Any) -> str:
        """Answer a conversation `[{"role": "user", "content": "…"}, …]` through the model's own chat template.

        Args:
            max_new_tokens: longest answer; None takes 512.
            options: those of `stream_chat`.

        Raises:
            TokenizerError, RequestError: as `stream_chat` does; a text alone is no conversation.
        """
        return "".join(self.stream_chat(messages, max_new_tokens, **options))

    def stream_chat(
        self,
        messages: Seq[Message],
        max_new_tokens: int | None = None,
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
            RequestError: these are no messages, or the template refuses them; a variable has a name of the template's
                own; what else `generate` refuses.
        """
        vocab = self.plan.graph.vocab
        asked = read_options(options, max_new_tokens, vocab, CHAT_TOKENS, counts_prompt=False)
        named = dict(variables or {})
        reserved = sorted(named.keys() & RESERVED)
        if reserved:
            raise RequestError(
                f"{', '.join(reserved)} cannot be a variable of the chat template", "it has its own meaning"
            )
        said = check_messages(messages)
        ids = self.tokenizer.encode_chat(said, True, tools, documents, template, **named)
        return self._stream(ids, len(ids), asked)

    def logits(self, prompt: Any) -> Any:
        """Logits of every token of a prompt; row i predicts token i + 1.

        Args:
            prompt: as `generate` takes it.

        Returns:
            float32 [tokens, vocab] of one prompt; of a list of texts or of lists a list of these; of a batch as tensor
            or array one of [batch, seq, vocab], whose rows of padding are NaN. NumPy arrays for arrays, else tensors.

        Raises:
            RequestError: as `generate` does.
        """
        prompts = self._prompts(prompt)
        greedy = SamplingParams(temperature=0)
        sequences = [Sequence(row, greedy, max_new_tokens=0, all_logits=True) for row in prompts.rows]
        with self._running():
            self._run(sequences)
        return prompts.scored([torch.cat(s.logits) for s in sequences])

    def close(self) -> None:
        """Release devices, memory and the file; a second call does nothing, any other afterwards is an error. Waits for
        what another thread generates."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._left.clear()
            try:
                self.engine.close()
            finally:
                self._checkpoint.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"context of {self.context} tokens"
        return f"<ktcore.Model {self.plan.graph.architecture} from {self._checkpoint.path}, {state}. {self.taken}>"

    def __enter__(self) -> Model:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _own_ends(self) -> frozenset[int]:
        return self._tokenizer.stop_ids if self._tokenizer else frozenset()

    def _read(self, prompt: Any, max_new_tokens: int | None, options: dict[str, Any]) -> tuple[Prompts, Options]:
        """What `generate` and `stream` were given: the prompts as ids, and the options."""
        options = dict(options)
        ids, mask = options.pop("input_ids", None), options.pop("attention_mask", None)
        if ids is not None:
            if prompt is not None:
                raise RequestError("a prompt and input_ids are given both", "leave one out")
            prompt = ids
        asked = read_options(options, max_new_tokens, self.plan.graph.vocab)
        # as in transformers: what also ends answers cannot be told from padding
        pad = None if asked.pad in asked.output.ends(self._own_ends) else asked.pad
        return self._prompts(prompt, mask, pad), asked

    def _prompts(self, prompt: Any, mask: Any = None, pad: int | None = None) -> Prompts:
        self._check_open()
        prompts = read_prompts(prompt, lambda text: self.tokenizer.encode(text), mask, pad)
        for row in prompts.rows:
            self._check_ids(row)
        return prompts

    def _stream(self, ids: list[int], given: int, asked: Options) -> TextStream:
        self._check_open()
        return TextStream(self, ids, asked.room(given), asked.params, asked.stop, asked.output)

    def _finish(self, streams: list[TextStream]) -> None:
        """Run streams to their ends."""
        try:
            self._begin(streams)
            while any(s.active for s in streams) and self._step(streams):
                pass
            self._collect(streams)
        finally:
            self._leave(streams)
        for stream in streams:
            if stream.error is not None:
                raise stream.error

    def _begin(self, streams: Seq[TextStream]) -> None:
        with self._running():
            for stream in streams:
                stream.begin()

    def _step(self, streams: Seq[TextStream]) -> bool:
        """One step; whoever reads another stream may have the next one, so that none waits for a reader."""
        with self._running():
            more = self.engine.step()
            for stream in streams:
                stream.collect()
            return more

    def _collect(self, streams: Seq[TextStream]) -> None:
        """What the steps of others have drawn for these."""
        with self._running():
            for stream in streams:
                stream.collect()

    def _leave(self, streams: Seq[TextStream]) -> None:
        """Cancel streams, at once or with the next step: Python may drop a forgotten one in the midst of a step."""
        self._left.extend(streams)
        if self._lock.acquire(blocking=False):
            try:
                if not self._closed:
                    self._cancel_left()
                    self.engine.settle()
            finally:
                self._lock.release()

    def _cancel_left(self) -> None:
        while self._left:
            self._left.popleft().close()

    def _check_ids(self, tokens: Seq[int]) -> None:
        vocab = self.plan.graph.vocab
        bad = next((t for t in tokens if not 0 <= t < vocab), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside of the vocabulary of {vocab}")

    def _run(self, sequences: list[Sequence]) -> None:
        try:
            for sequence in sequences:
                self.engine.add(sequence)
            while any(sequence.finish is None for sequence in sequences) and self.engine.step():
                pass
            self.engine.settle()
        except BaseException:
            for sequence in sequences:
                self.engine.cancel(sequence)
            raise
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The engine for the caller alone."""
        with self._lock:
            self._check_open()
            self._cancel_left()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the model is closed", "load it again")
