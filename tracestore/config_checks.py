"""What a configuration may not say although every key and type in it is right: names that nothing has or that cannot be
folders, numbers that are not finite, engines that are none or are two models', sections that exclude each other,
expressions and times that are none. Every refusal names the key and what to write instead; an
unknown name comes with the near misses. Called by `tracestore.config`, once for each file.
"""

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from tracegrad.tracestore.algorithm import wrong_algorithm
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.moments import moment_of
from tracegrad.tracestore.section import near_misses

if TYPE_CHECKING:
    from tracegrad.tracestore.config import Config, ModelConfig

_FOLDER = re.compile(r"\w[\w.:@+ -]{0,99}")
_LARGEST_SEED = 2**63 - 1
_PORTS = {"http": 80, "https": 443}
_FINGERPRINT = re.compile("fp_[0-9a-f]{16}")


def check(config: "Config", origin: str) -> None:
    """Refuse what the sections say of one another that cannot hold.

    Raises:
        ConfigError: an unknown model or role, a model with sections that exclude each other, a wrong expression, a
            number that is not finite, a name that is no folder's, an engine without an address or of two models.
    """
    _check_numbers(config, origin)
    _check_names(config, origin)
    _check_models(config, origin)
    _check_engines(config, origin)
    _check_adapters(config, origin)
    _check_roles(config, origin)
    _check_rules(config, origin)
    _check_redactions(config, origin)
    _check_mode(config, origin)
    _check_gate(config, origin)
    _check_runs(config, origin)
    if (wrong := wrong_algorithm(config.trainer.algorithm)) is not None:
        raise ConfigError(f"{origin}: trainer.algorithm.{wrong}")


def _check_numbers(config: "Config", origin: str) -> None:
    for place, number in _numbers(msgspec.to_builtins(config), ""):
        if not math.isfinite(number):
            raise ConfigError(f"{origin}: {place} is {number}: write a finite number")
    if config.trainer.seed > _LARGEST_SEED:
        raise ConfigError(f"{origin}: trainer.seed is {config.trainer.seed}: write one up to {_LARGEST_SEED}")


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Yield (dotted place, number) for every float of the configuration."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _numbers(inner, f"{place}[{number}]")


def _check_names(config: "Config", origin: str) -> None:
    folders = {f"models.{name}, which is trained,": name for name, model in config.models.items() if model.trained}
    for what, name in {**folders, f"trainer.job {config.trainer.job!r}": config.trainer.job}.items():
        if not _FOLDER.fullmatch(name):
            raise ConfigError(
                f"{origin}: {what} names a folder: begin with a letter, a digit or _, and go on with these or with "
                ". : @ + - and spaces, 100 characters in all at most"
            )


def _check_engines(config: "Config", origin: str) -> None:
    taken: dict[tuple[str, int, str], str] = {}
    for name, model in config.models.items():
        for number, each in enumerate(model.each_engine()):
            where, url = f"models.{name}.{f'replicas[{number - 1}]' if number else 'engine.url'}", each.engine.url
            address = _address(url)
            if address is None:
                raise ConfigError(f"{origin}: {where} is {url!r}: write http://HOST:PORT")
            if taken.setdefault(address, name) != name:
                raise ConfigError(
                    f"{origin}: {where} is {url}, the engine of models.{taken[address]}: an engine serves one model "
                    "and its adapters, so give each model engines of its own"
                )


def _address(url: str) -> tuple[str, int, str] | None:
    """Return host, port and path of an http URL, None of anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    if port is None or not parts.hostname or parts.scheme not in _PORTS or parts.query or parts.fragment:
        return None
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
    return host, port, parts.path.rstrip("/")


def _check_models(config: "Config", origin: str) -> None:
    for name, settings in config.models.items():
        if (wrong := _wrong_model(settings)) is not None:
            raise ConfigError(f"{origin}: models.{name} {wrong}")
    trained = config.trainer.model
    if not trained or not any(model.trained for model in config.models.values()):
        return
    _known_model("trainer.model", trained, config, origin)
    if not config.models[trained].trained:
        can = ", ".join(name for name, each in config.models.items() if each.trained)
        raise ConfigError(f"{origin}: trainer.model names {trained!r}, which is not trained; name one of {can}")


def _check_adapters(config: "Config", origin: str) -> None:
    for name, model in config.models.items():
        if model.adapter is None:
            continue
        where, of = f"models.{name}.adapter.of", model.adapter.of
        _known_model(where, of, config, origin)
        below = config.models[of]
        if below.adapter is not None:
            raise ConfigError(
                f"{origin}: {where} names {of!r}, which is an adapter itself; name what that one lies on, "
                f"{below.adapter.of!r}"
            )
        if below.api is not None:
            raise ConfigError(f"{origin}: {where} names {of!r}, which an outside API serves: it takes no adapter")
        if below.trained:
            raise ConfigError(
                f"{origin}: {where} names {of!r}, which is trained itself: its weights would move under the adapter; "
                f"write `trained: false` in models.{of}"
            )


def _check_roles(config: "Config", origin: str) -> None:
    for role, model in config.roles.items():
        _known_model(f"role {role!r}", model, config, origin)
    for role in config.proxy.sampling:
        _known_role("proxy.sampling names", role, config, origin)


def _known_model(who: str, model: str, config: "Config", origin: str) -> None:
    if model not in config.models:
        near = near_misses(model, config.models)
        raise ConfigError(f"{origin}: {who} names the model {model!r}, which `models` does not have{near}")


def _known_role(what: str, role: str, config: "Config", origin: str) -> None:
    if role != "*" and role not in config.roles and "*" not in config.roles:
        near = near_misses(role, config.roles)
        raise ConfigError(f"{origin}: {what} the role {role!r}, which `roles` does not have{near}")


def _check_rules(config: "Config", origin: str) -> None:
    for number, rule in enumerate(config.role_rules):
        where = f"{origin}: role_rules[{number}]"
        if config.roles:
            _known_role(f"role_rules[{number}] gives", rule.role, config, origin)
        if (rule.agent, rule.node, rule.model, rule.fingerprint) == (None,) * 4 and not rule.header:
            raise ConfigError(f"{where} has no condition; give it an agent, node, model, header or fingerprint")
        if rule.fingerprint is not None and not _FINGERPRINT.fullmatch(rule.fingerprint):
            raise ConfigError(f"{where}: {rule.fingerprint!r} is no fingerprint; copy one from `tracegrad show --json`")


def _check_redactions(config: "Config", origin: str) -> None:
    for number, redaction in enumerate(config.redact):
        where = f"{origin}: redact[{number}]"
        try:
            empty = re.compile(redaction.pattern).search("") is not None
        except re.error as error:
            raise ConfigError(f"{where}: {redaction.pattern!r} is no regular expression: {error}") from error
        if empty:
            raise ConfigError(f"{where}: {redaction.pattern!r} matches where nothing is; make it match something")


def _check_mode(config: "Config", origin: str) -> None:
    where, publish = f"{origin}: trainer.publish.mode is in_flight", config.trainer.publish
    if publish.mode != "in_flight":
        return
    if publish.gate is not None:
        raise ConfigError(f"{where}, and a gate lets nobody but its evaluation meet a candidate: write drain")
    adapters = [name for name in config.trained_models() if config.models[name].adapter is not None]
    if adapters:
        raise ConfigError(
            f"{where}, and engines do not say which weights of an adapter sampled a token ({adapters[0]}): write drain"
        )


def _check_gate(config: "Config", origin: str) -> None:
    gate = config.trainer.publish.gate
    if gate is None:
        return
    where = f"{origin}: trainer.publish.gate"
    if gate.rule.minimum is None and gate.rule.max_drop is None:
        raise ConfigError(f"{where}.rule lets everything pass: give it a minimum, a max_drop, or both")
    alone = [name for name in config.trained_models() if not config.judged_beside(name)]
    alone = [name for name in alone if len(config.engines_of(name)) == 1]
    if alone and gate.share not in (0.0, 1.0):
        raise ConfigError(
            f"{where}.share is {gate.share:g}, and one engine serves one version at a time: write 0 (others wait while "
            f"the candidate is judged) or 1 (they get the candidate), or add replicas to {', '.join(alone)}"
        )


def _check_runs(config: "Config", origin: str) -> None:
    runs, where = config.trainer.batch.runs, f"{origin}: trainer.batch.runs"
    ours = {role for role, model in config.roles.items() if model in config.trained_models()}
    for role in runs.roles:
        if role not in ours and ("*" not in ours or role in config.roles):
            near = near_misses(role, ours - {"*"})
            raise ConfigError(f"{where}.roles names {role!r}, which `roles` maps to no model that is trained{near}")
    for name, time in (("since", runs.since), ("until", runs.until)):
        if time is not None:
            moment_of(time, f"{where}.{name}")


def _wrong_model(model: "ModelConfig") -> str | None:
    """Return what is wrong with the section of a model, None where nothing is."""
    if model.adapter is not None:
        return _wrong_adapter(model)
    if model.api is not None:
        return _wrong_api(model)
    urls = [each.engine.url.rstrip("/") for each in model.each_engine()]
    if len(set(urls)) < len(urls):
        return f"names one engine twice ({', '.join(urls)}): give each replica a URL of its own"
    if model.replicas and model.engine.transfer.backend == "ipc":
        return "has replicas, and engine.transfer.backend ipc reaches one GPU: write nccl, memory or files"
    if model.checkpoint:
        return None
    return "has neither `checkpoint` (weights of ours), `adapter` (on such) nor `api` (somebody else's)"


def _wrong_adapter(model: "ModelConfig") -> str | None:
    assert model.adapter is not None
    if model.api is not None or _has_weights_of_its_own(model):
        return (
            "has `adapter`, so it has no `checkpoint`, `engine`, `replicas` or `api` "
            f"(those of models.{model.adapter.of} serve it): remove them"
        )
    if not model.trained:
        return f"is an adapter that nobody trains, so it adds nothing: map its roles to {model.adapter.of!r}"
    return None


def _wrong_api(model: "ModelConfig") -> str | None:
    assert model.api is not None
    if model.trained:
        return "is served by an outside API, which cannot be trained: write `trained: false` beside `api`"
    if _has_weights_of_its_own(model):
        return "has `api`, so it has no `checkpoint`, `engine` or `replicas`: remove them"
    if not model.api.url.startswith(("https://", "http://")):
        return f"has api.url {model.api.url!r}: write https://HOST/v1"
    return None


def _has_weights_of_its_own(model: "ModelConfig") -> bool:
    return bool(model.checkpoint or model.replicas or model.engine != type(model.engine)())
