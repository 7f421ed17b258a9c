"""Whether calls that another model answered can be trained: their token ids must mean the same tokens.

Read from the tokenizer files of the two checkpoints (which token has which id, not how text is cut or templates are
written: ids are never made from text here). Refuses models whose ids differ, and those of which it cannot be seen; ids
never cross tokenizers. Online it refuses them all. Called by the controller before anything is leased.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import LeaseRule
from tracegrad.tracestore.store import Store
from tracegrad.trainer.errors import TrainerError

_OTHER_FORMATS = ("tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "added_tokens.json")


def check_recorded_models(store: Store, config: Config, rule: LeaseRule, *, offline: bool) -> None:
    """Compare the tokens of every recorded model with those of the models that are trained.

    Raises:
        TrainerError: the ids of one mean other tokens, its tokenizer cannot be found, or the job is not offline.
    """
    named = config.trainer.batch.runs.recorded_models
    if named and not offline:
        raise TrainerError(
            f"trainer.batch.runs.recorded_models names {', '.join(named)}: age is counted in steps of one model, so "
            "calls of others can be trained with --offline only"
        )
    if not rule.recorded_models:
        return
    for model in rule.models:
        own_folder = Path(config.models[config.held_by(model)].checkpoint)
        own = _tokens_or_raise(model, [own_folder])[1]
        for name in rule.recorded_models:
            folder, tokens = _tokens_or_raise(name, _folders(store, config, name))
            if tokens != own:
                raise TrainerError(
                    f"calls of {name!r} cannot train {model!r}: the token ids of {folder} are not those of "
                    f"{own_folder}; take {name!r} out of trainer.batch.runs.recorded_models, or train a model that has "
                    "the same tokenizer"
                )


def tokens_of(folder: Path) -> str | None:
    """Return a digest of which token has which id, or None where the folder has no tokenizer that can be read."""
    try:
        return _digest(_table(json.loads((folder / "tokenizer.json").read_text())))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = sorted({path for pattern in _OTHER_FORMATS for path in folder.glob(pattern)})
    known = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in found]
    return _digest(known) if any(name != "added_tokens.json" for name, _ in known) else None


def _table(tokenizer: Any) -> Any:
    """What a tokenizer.json says of ids: the vocabulary (a mapping, or a list in order) and the tokens beside it."""
    added = sorted((one["id"], one["content"]) for one in tokenizer.get("added_tokens") or ())
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return [sorted(vocabulary.items(), key=lambda one: (one[1], one[0])), added]
    return [[token for token, *_score in vocabulary], added]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _folders(store: Store, config: Config, name: str) -> list[Path]:
    """Where the tokenizer of a model may lie: its checkpoint here, else what was published of it, the newest first."""
    named = config.models.get(config.held_by(name)) if name in config.models else None
    configured = [Path(named.checkpoint)] if named is not None and named.checkpoint else []
    return configured + [Path(version.checkpoint_path) for version in reversed(store.list_versions(name))]


def _tokens_or_raise(name: str, folders: list[Path]) -> tuple[Path, str]:
    for folder in folders:
        tokens = tokens_of(folder)
        if tokens is not None:
            return folder, tokens
    looked = ", ".join(map(str, folders[:3])) or "nowhere: no version of it is stored"
    raise TrainerError(
        f"the tokenizer of {name!r} is not to be found (looked in {looked}), so nobody can say that its token ids mean "
        f"the same; name a folder with its tokenizer as models.{name}.checkpoint"
    )
