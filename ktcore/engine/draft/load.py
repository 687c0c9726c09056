"""Loads the model that drafts for another one: the same vocabulary, the same pages, the same devices."""

from __future__ import annotations

from pathlib import Path

from ktcore.engine.draft.asked import Draft
from ktcore.engine.draft.further import FurtherDrafter
from ktcore.engine.draft.pair import PairDrafter
from ktcore.engine.load.loader import load_modules
from ktcore.engine.load.room import check_room
from ktcore.engine.prefix.identity import prefix_identity
from ktcore.engine.schedule.scheduler import Scheduler
from ktcore.engine.step.drafter import Drafting
from ktcore.engine.step.runner import LoadedModel
from ktcore.errors import PlanError, TokenizerError
from ktcore.rules.plan import Plan
from ktcore.rules.prepare import Prepared, prepare
from ktcore.text.open import load_tokenizer
from ktcore.text.tokenizer import Tokenizer
from ktcore.weights.checkpoint import Checkpoint


def load_drafting(
    asked: Draft, target: Prepared, modules: LoadedModel, tokenizer: Tokenizer | None, context: int, threads: int | None
) -> Drafting:
    """What was asked for, loaded.

    Args:
        modules: of the target, with its further layer where that drafts.
        context: tokens that the target's cache holds.

    Raises:
        TokenizerError: the vocabularies differ.
        PlanError: the caches cannot share pages, the model has recurrent states, or it does not fit.
        KtcoreError: what else loading a model raises.
    """
    try:
        return _loaded(asked, target, modules, tokenizer, context, threads)
    except BaseException:
        modules.close()
        raise


def _loaded(
    asked: Draft, target: Prepared, modules: LoadedModel, tokenizer: Tokenizer | None, context: int, threads: int | None
) -> Drafting:
    if asked.path is None:
        return Drafting(lambda model, scheduler: FurtherDrafter(model, scheduler, asked.most))
    prepared = prepare(asked.path, backend=target.plan.backend, context=context)
    with prepared.checkpoint as checkpoint:
        _check_vocabulary(asked.path, checkpoint, prepared.plan, target, tokenizer)
        _check_pages(asked.path, prepared.plan, target.plan.page_size)
        check_room(prepared.plan, prepared.registry, context, mapped=prepared.packed is not None)
        small = load_modules(
            prepared.plan,
            checkpoint,
            prepared.registry,
            threads,
            max_tokens=target.plan.step_tokens,
            packed=prepared.packed,
            devices=modules.devices,
        )
        identity = prefix_identity(checkpoint, prepared.plan)
    vocab = target.plan.graph.vocab

    def make(model: LoadedModel, scheduler: Scheduler) -> PairDrafter:
        return PairDrafter(small, scheduler, asked.most, vocab)

    return Drafting(make, small, identity)


def _check_vocabulary(
    path: Path, checkpoint: Checkpoint, plan: Plan, target: Prepared, tokenizer: Tokenizer | None
) -> None:
    own = load_tokenizer(checkpoint)
    if own is None or tokenizer is None:
        same = plan.graph.vocab == target.plan.graph.vocab
    else:
        same = own.vocabulary() == tokenizer.vocabulary()
    if not same:
        raise TokenizerError(
            f"{path} has another vocabulary than {target.checkpoint.path}, and cannot draft for it",
            "take a model of the same family: a drafted token has to mean the same in both",
        )


def _check_pages(path: Path, plan: Plan, size: int) -> None:
    if any(choice.state_bytes for choice in plan.choices.values()):
        raise PlanError(
            f"{path} has recurrent states, which cannot go back behind a wrong draft",
            "draft with a model that has attention alone",
        )
    for name, choice in plan.choices.items():
        sizes = choice.implementation.page_sizes(choice.node.spec)
        if sizes and size not in sizes:
            raise PlanError(
                f"{path}: {choice.implementation.id} ({name}) works with pages of "
                f"{', '.join(map(str, sizes))} tokens, the model that it drafts for has pages of {size}",
                "draft with a model whose caches share the size",
            )
