"""What a configuration may not say although each value has the right type: names, roles and times that do not fit.

Every refusal names the place in the file and what to write there. Called by `config.parse_config`.
"""

import re

from tracegrad.tracestore.config import Config, EngineConfig, ModelConfig, near_misses
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.moments import moment_of

_FINGERPRINT = re.compile("fp_[0-9a-f]{16}")


def check(config: Config, origin: str) -> None:
    """Refuse what does not fit together. Raises ConfigError."""
    _check_models(config, origin)
    _check_rules(config, origin)
    _check_redactions(config, origin)
    _check_gate(config, origin)
    _check_runs(config, origin)


def _check_models(config: Config, origin: str) -> None:
    for name, settings in config.models.items():
        if (wrong := _wrong_model(settings)) is not None:
            raise ConfigError(f"{origin}: models.{name} {wrong}")
    named = [(f"role {role!r}", model) for role, model in config.roles.items()]
    if any(model.trained for model in config.models.values()):
        named.append(("trainer.model", config.trainer.model))
    for who, model in named:
        if model not in config.models:
            near = near_misses(model, config.models)
            raise ConfigError(f"{origin}: {who} names the model {model!r}, which `models` does not have{near}")
        if who == "trainer.model" and not config.models[model].trained:
            can = ", ".join(name for name, each in config.models.items() if each.trained)
            raise ConfigError(f"{origin}: trainer.model names {model!r}, which is not trained; name one of {can}")
    for role in config.proxy.sampling:
        if role != "*" and role not in config.roles and "*" not in config.roles:
            near = near_misses(role, config.roles)
            raise ConfigError(f"{origin}: proxy.sampling names the role {role!r}, which `roles` does not have{near}")


def _check_rules(config: Config, origin: str) -> None:
    for number, rule in enumerate(config.role_rules):
        where = f"{origin}: role_rules[{number}]"
        if config.roles and rule.role not in config.roles and "*" not in config.roles:
            near = near_misses(rule.role, config.roles)
            raise ConfigError(f"{where} gives the role {rule.role!r}, which `roles` does not have{near}")
        if (rule.agent, rule.node, rule.model, rule.fingerprint) == (None,) * 4 and not rule.header:
            raise ConfigError(f"{where} has no condition; give it an agent, node, model, header or fingerprint")
        if rule.fingerprint is not None and not _FINGERPRINT.fullmatch(rule.fingerprint):
            raise ConfigError(f"{where}: {rule.fingerprint!r} is no fingerprint; copy one from `tracegrad show --json`")


def _check_redactions(config: Config, origin: str) -> None:
    for number, redaction in enumerate(config.redact):
        where = f"{origin}: redact[{number}]"
        try:
            empty = re.compile(redaction.pattern).search("") is not None
        except re.error as error:
            raise ConfigError(f"{where}: {redaction.pattern!r} is no regular expression: {error}") from error
        if empty:
            raise ConfigError(f"{where}: {redaction.pattern!r} matches where nothing is; make it match something")


def _check_gate(config: Config, origin: str) -> None:
    gate, model = config.trainer.publish.gate, config.models.get(config.trainer.model)
    if gate is None:
        return
    where = f"{origin}: trainer.publish.gate"
    if gate.rule.minimum is None and gate.rule.max_drop is None:
        raise ConfigError(f"{where}.rule lets everything pass: give it a minimum, a max_drop, or both")
    if model is not None and not model.replicas and gate.share not in (0.0, 1.0):
        raise ConfigError(
            f"{where}.share is {gate.share:g}, and one engine serves one version at a time: write 0 (others wait while "
            "the candidate is judged) or 1 (they get the candidate), or add replicas"
        )


def _check_runs(config: Config, origin: str) -> None:
    runs, where = config.trainer.batch.runs, f"{origin}: trainer.batch.runs"
    ours = {role for role, model in config.roles.items() if model == config.trainer.model}
    for role in runs.roles:
        if role not in ours and ("*" not in ours or role in config.roles):
            near = near_misses(role, ours - {"*"})
            raise ConfigError(f"{where}.roles names {role!r}, which `roles` does not map to trainer.model{near}")
    for name, time in (("since", runs.since), ("until", runs.until)):
        if time is not None:
            moment_of(time, f"{where}.{name}")


def _wrong_model(model: ModelConfig) -> str | None:
    """Return what is wrong with the section of a model, None where nothing is."""
    if model.api is None:
        urls = [each.engine.url.rstrip("/") for each in model.each_engine()]
        if len(set(urls)) < len(urls):
            return f"names one engine twice ({', '.join(urls)}): give each replica a URL of its own"
        return None if model.checkpoint else "has neither `checkpoint` (weights of ours) nor `api` (somebody else's)"
    if model.trained:
        return "is served by an outside API, which cannot be trained: write `trained: false` beside `api`"
    if model.checkpoint or model.replicas or model.engine != EngineConfig():
        return "has `api`, so it has no `checkpoint`, `engine` or `replicas`: remove them"
    if not model.api.url.startswith(("https://", "http://")):
        return f"has api.url {model.api.url!r}: write https://HOST/v1"
    return None
