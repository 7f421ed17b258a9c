"""The configuration file: one YAML for store, roles, engines, proxy and trainer.

Both sides of the store read it, so it lives here. Unknown keys are errors, with the near misses named;
relative paths are relative to the file. Environment and command line override nothing silently: a process
resolves its configuration once, and `--show-config` prints the result.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from tracegrad.tracestore.algorithm import AlgorithmConfig
from tracegrad.tracestore.config_checks import check
from tracegrad.tracestore.config_text import read_yaml, yaml_text
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.section import AtLeastZero, Count, Natural, Positive, Section, Share, explained
from tracegrad.tracestore.tracking import TrackingConfig

DEFAULT_FILE = Path("tracegrad.yaml")
"""What commands read where no file is named."""

Allowed = Literal["chat_template", "media_urls", "media_kwargs", "embeds", "priority"]
"""What clients may send to an engine only where the operator says so."""

_Beta = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class TransferConfig(Section, frozen=True, kw_only=True):
    """How new weights come into an engine that runs. Adapters always come as files."""

    backend: Literal["files", "memory", "ipc", "nccl"] = "files"
    """files: the engine reads the checkpoint's folder. The others are backends of vLLM's weight-transfer protocol.
    memory: shared memory of one machine (ours, on any device); ipc: CUDA memory of the GPU that the engine has; nccl:
    from another GPU, here or elsewhere."""
    python: str = "{python}"
    """ipc, nccl: interpreter that has the engine's vLLM, whose own client sends. `{python}`: ours."""
    gpu: str = "0"
    """ipc, nccl: the GPU to send from, as CUDA_VISIBLE_DEVICES names it. ipc: the engine's own; nccl: another."""
    address: str = "127.0.0.1"
    """nccl: where the engine finds the sender."""


class EngineConfig(Section, frozen=True, kw_only=True):
    """The vLLM that serves one model."""

    url: str = "http://127.0.0.1:8000"
    bind: str | None = None
    """Address that the engine listens on where it is not the host of `url`. For a private network only: the engine's
    control endpoints have no authentication."""
    external: bool = False
    """The engine at `url` is somebody else's to start and to watch."""
    launch: tuple[str, ...] = ()
    """Front of the command that starts the engine, in place of the default (`python -m vllm…`); `{python}`,
    `{model}`, `{name}`, `{host}` and `{port}` are filled in."""
    args: tuple[str, ...] = ()
    """Further arguments, after tracegrad's own."""
    env: Mapping[str, str] = {}
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    max_model_len: Count = 2048
    max_num_seqs: Count = 32
    start_timeout_s: Positive = 600.0
    log: str | None = None
    transfer: TransferConfig = TransferConfig()


class ApiConfig(Section, frozen=True, kw_only=True):
    """Somebody else's OpenAI-compatible API that serves a model. The credential is named, never written down here."""

    url: str
    """Up to and with the version, as for the OpenAI SDK: https://api.example.com/v1"""
    key_env: str
    """Environment variable of the proxy that holds the API key."""
    model: str
    """The name that the API knows the model by."""


class AdapterConfig(Section, frozen=True, kw_only=True):
    """A LoRA adapter on another model's weights, which stay as they are and may carry several."""

    of: str
    """The model whose checkpoint it lies on, whose engines serve it."""
    rank: Annotated[int, msgspec.Meta(ge=1, le=512)] = 16
    alpha: Positive = 32.0
    """What the adapter adds is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one (`q_proj`, ...). Empty: every linear layer but the head."""


class ModelConfig(Section, frozen=True, kw_only=True):
    """Physical weights and the engines that serve them; or an adapter on another model's; or an outside API."""

    checkpoint: str = ""
    adapter: AdapterConfig | None = None
    engine: EngineConfig = EngineConfig()
    replicas: tuple[str, ...] = ()
    """URLs of further engines with the settings of `engine`; `{replica}` in its `env` and `args` is 0, 1, 2, ..."""
    api: ApiConfig | None = None
    trained: bool = True

    def each_engine(self) -> "tuple[ModelConfig, ...]":
        """Return this configuration once for each of its own engines, with that one's URL, log and `{replica}`."""
        if self.api is not None or self.adapter is not None:
            return ()
        urls = (self.engine.url, *self.replicas)
        return tuple(
            msgspec.structs.replace(self, replicas=(), engine=_replica(self.engine, url, i))
            for i, url in enumerate(urls)
        )


class SamplingOverride(Section, frozen=True, kw_only=True):
    """What the proxy sets on the calls of runs with purpose `train`; `None` leaves the client's value."""

    temperature: AtLeastZero | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    """0 and -1: every token, as vLLM reads them."""
    max_tokens: Count | None = None


class AccessConfig(Section, frozen=True, kw_only=True):
    """Who may talk to the proxy, and of what."""

    keys: Literal["auto", "on", "off"] | bool = "auto"
    """Whether requests need an API key; auto: unless the proxy listens on loopback. YAML reads a bare `on` as true."""
    allow: tuple[Allowed, ...] = ()
    """Fields that reach into the engine and are refused unless named here: `chat_template` (another prompt format),
    `media_urls` (the engine fetches http and file URLs), `media_kwargs`, `embeds` (tensors), `priority`."""


class LimitsConfig(Section, frozen=True, kw_only=True):
    """How much one request may be."""

    max_body_bytes: Count = 32 * 1024 * 1024
    """As sent, and unpacked where it is compressed."""
    max_header_bytes: Count = 64 * 1024
    max_messages: Count = 10_000
    max_tools: Count = 1_000
    max_kept: Natural = 256
    """How many of the likeliest tokens the engine is asked for at most where top-p, top-k or min-p cut the others off,
    so that what was left is on record and can be trained on; 0: none. What `tracegrad engine` starts allows as many,
    another vLLM 20 unless it has `--max-logprobs`."""


class ProxyConfig(Section, frozen=True, kw_only=True):
    """The OpenAI-compatible front. On loopback it needs no API keys, elsewhere it does."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8080
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Processes that listen on the port."""
    log: Literal["text", "json"] = "text"
    sampling: Mapping[str, SamplingOverride] = {}
    """Role (or `*`) -> the sampling override of purpose `train`."""
    idle_close_s: Positive = 300.0
    poll_s: Positive = 0.05
    heartbeat_expires_s: Positive = 10.0
    upstream_timeout_s: Positive = 600.0
    hold_timeout_s: AtLeastZero = 600.0
    """How long a request waits for a publish or for an engine that is down, at most; less where its client says so."""
    access: AccessConfig = AccessConfig()
    limits: LimitsConfig = LimitsConfig()


class OptimizerConfig(Section, frozen=True, kw_only=True):
    """AdamW on fp32 master weights."""

    lr: AtLeastZero = 1e-5
    critic_lr: AtLeastZero = 1e-4
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    weight_decay: AtLeastZero = 0.0
    max_grad_norm: Positive = 1.0
    warmup_steps: Natural = 0
    epochs: Count = 1
    minibatches: Count = 1


class RunsConfig(Section, frozen=True, kw_only=True):
    """Which runs a job takes, and which of their rewards count."""

    purposes: Annotated[tuple[Literal["train", "live"], ...], msgspec.Meta(min_length=1)] = ("train", "live")
    roles: tuple[str, ...] = ()
    """Only calls of these roles train. Empty: every role that the role map gives to a model of the job."""
    since: str | None = None
    """ISO time: only runs opened from then on; `until`: before then."""
    until: str | None = None
    reward_sources: tuple[str, ...] = ()
    """Only rewards from these sources count, such as `langsmith` for feedback. Empty: from every one."""
    grace_s: AtLeastZero = 0.0
    """A run is trained so long after its end at the earliest: rewards that come meanwhile are in."""
    epoch: Natural = 0
    """A run trains once in each epoch of a job: raise it to train everything once more, with its newest rewards."""
    recorded_models: tuple[str, ...] = ()
    """Offline only: other models whose calls train, by their roles in the present role map. They must have the
    tokenizer of the models that are trained."""


class BatchConfig(Section, frozen=True, kw_only=True):
    """What one step trains, and how it is laid into rows."""

    runs: RunsConfig = RunsConfig()
    groups: Count = 8
    max_staleness: Natural = 1
    """A run is too stale when the weights that sampled it are more updates behind the live ones of their model."""
    min_group: Count = 2
    """A group with fewer closed, rewarded members than this is not leased for group advantages."""
    row_tokens: Count = 2048
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them: less memory, more time."""
    lease_s: Positive = 600.0
    poll_s: Positive = 0.25


class GateRule(Section, frozen=True, kw_only=True):
    """What a candidate must show in the gate's evaluation. At least one of `minimum` and `max_drop`."""

    minimum: float | None = None
    """The least mean score."""
    max_drop: AtLeastZero | None = None
    """How much worse than the live version the mean score may be: by task, and at `confidence`."""
    confidence: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.9
    """One-sided, of "not worse by more than max_drop"; 0.5 compares the means alone. Few tasks at a high confidence
    reject also what is as good."""
    max_failed: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.05
    """Share of the runs that may fail or stay without the score. They are in no mean."""


class RejectedConfig(Section, frozen=True, kw_only=True):
    """What training does after a version was rejected."""

    then: Literal["continue", "return"] = "continue"
    """Train on from the rejected version, or from the live one, whose optimizer state comes back with it."""
    stop_after: Count | None = 3
    """So many rejections in a row end the trainer: the live version falls ever further behind what is trained."""


class GateConfig(Section, frozen=True, kw_only=True):
    """A held-out evaluation that each new version must pass before it serves. `tracegrad gate` makes it."""

    app: str
    """The compiled graph, as module:attribute or file.py:attribute."""
    tasks: str
    """The held-out task file, JSON Lines."""
    reward: str
    """fn(task, output) -> rewards, as module:function or file.py:function."""
    rule: GateRule
    score: str = "reward"
    """Which of the rewards decides."""
    samples: Count = 1
    """Runs per task; they are averaged."""
    concurrency: Count = 16
    timeout_s: Positive = 600.0
    """How long the evaluation may take, and so how long a single engine may be closed to others. Then the candidate is
    rejected."""
    share: Share = 0.0
    """Share of the other runs that the candidate serves while it is judged. With one engine 0 makes them wait and 1
    lets all through; with replicas, and of an adapter with one engine, the rest of the runs stays with the live one."""
    rejected: RejectedConfig = RejectedConfig()


class PublishConfig(Section, frozen=True, kw_only=True):
    """How weights reach the engine, and when a swap is refused."""

    mode: Literal["drain", "in_flight"] = "drain"
    """drain: calls end before engines change weights. in_flight: they go on under the new ones, each token known."""
    probe_tokens: Count = 512
    probe_bound: Positive = 0.1
    """Bound on mean |trainer - engine| logprob over the probe's tokens (nats). Rounding of bf16 alone gives 0.03-0.05;
    in fp32 0.001 holds."""
    canary: bool = True
    drain_timeout_s: Positive = 300.0
    swap_timeout_s: Positive = 120.0
    gate: GateConfig | None = None


class WorkersConfig(Section, frozen=True, kw_only=True):
    """The processes that hold the weights of one model, or of one base with its adapters."""

    per_group: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    """Several share weights, gradients and optimizer state (FSDP2) and divide the rows of each step."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: each worker has one GPU to itself."""
    threads: Count = 2
    """CPU cores of each."""


class TrainerConfig(Section, frozen=True, kw_only=True):
    """One training job."""

    job: str = "main"
    model: str = ""
    """The one model that this job trains. Empty: every model that is `trained`."""
    steps: Natural = 100
    seed: Natural = 0
    output: str = "out"
    precision: Literal["fp32", "bf16"] = "bf16"
    """fp32: everything in float32. bf16: float32 master weights, rounded to bfloat16 to compute with."""
    workers: WorkersConfig = WorkersConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    publish: PublishConfig = PublishConfig()
    keep_checkpoints: Count = 2


class RoleRule(Section, frozen=True, kw_only=True):
    """A role for calls that no header, path or key gives one. Every condition that is set must hold."""

    role: str
    agent: str | None = None
    """The name that the hook gives the caller: the agent's, else its outermost node's."""
    node: str | None = None
    """The LangGraph node that calls, or one that it runs in."""
    model: str | None = None
    """The model name in the request."""
    header: Mapping[str, str] = {}
    """Request headers with exactly these values."""
    fingerprint: str | None = None
    """Of the system prompt and the tools, as `tracegrad show --json` prints it."""


class Redaction(Section, frozen=True, kw_only=True):
    """Text that is not to be stored. What it is found in is masked, and a call loses its tokens: it is not trained."""

    pattern: str
    """A regular expression of Python's `re`. It runs on every text, so keep it free of nested repetitions."""
    replacement: str = msgspec.field(default="[redacted]", name="with")
    """What stands in its place, literally. Written `with` in the file."""


class Config(Section, frozen=True, kw_only=True):
    """The whole file."""

    store: str = "sqlite:///tracegrad.db"
    project: str = "default"
    models: Mapping[str, ModelConfig] = {}
    roles: Mapping[str, str] = {}
    """Role -> model. `*` stands for every role not named."""
    role_rules: tuple[RoleRule, ...] = ()
    """In order: the first that holds gives the role."""
    infer_roles: bool = False
    """Whether a call that nobody gives a role gets the only one its fingerprint was seen with; it is trained then."""
    token_in: tuple[str, ...] = ()
    """Projects (or `*`) whose prompts go on from the token ids that were really sampled: an earlier prompt and answer
    of the run are given to the engine as they were, not as the chat template writes them anew."""
    redact: tuple[Redaction, ...] = ()
    """In order, in everything that people or models said."""
    proxy: ProxyConfig = ProxyConfig()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()

    def model_of(self, role: str | None) -> str | None:
        """Return the physical model of `role`, or None where the role map says nothing of it."""
        if role is not None and role in self.roles:
            return self.roles[role]
        return self.roles.get("*")

    @property
    def publishes_in_flight(self) -> bool:
        """Whether calls go on while engines change weights."""
        return self.trainer.publish.mode == "in_flight"

    def trained_models(self) -> tuple[str, ...]:
        """Return the models that the job trains, in the order of the file."""
        one = self.trainer.model
        return tuple(name for name, model in self.models.items() if model.trained and one in ("", name))

    def held_by(self, name: str) -> str:
        """Return the model in whose weights `name` lies: an adapter in that of its base, any other in its own."""
        adapter = self.models[name].adapter
        return name if adapter is None else adapter.of

    def worker_groups(self) -> dict[str, tuple[str, ...]]:
        """Return, for each model whose weights a worker group holds, what the group trains: itself, or its adapters."""
        groups: dict[str, tuple[str, ...]] = {}
        for name in self.trained_models():
            held_by = self.held_by(name)
            groups[held_by] = (*groups.get(held_by, ()), name)
        return groups

    def adapters_on(self, name: str) -> "tuple[AdapterConfig, ...]":
        """Return the adapters that lie on the model, in the order of the file."""
        adapters = [model.adapter for model in self.models.values() if model.adapter is not None]
        return tuple(adapter for adapter in adapters if adapter.of == name)

    def judged_beside(self, name: str) -> bool:
        """Whether candidates of the model are judged beside what is live: of an adapter on one engine, by a share."""
        gate = self.trainer.publish.gate
        if gate is None or not 0 < gate.share < 1:
            return False
        return self.held_by(name) != name and name in self.trained_models() and len(self.engines_of(name)) == 1

    def adapter_slots(self, name: str) -> int:
        """Return how many adapters an engine of the base holds: all, and the next (judged at once, else in turn)."""
        adapters = [each for each in self.models if self.held_by(each) == name != each]
        return len(adapters) + max(sum(map(self.judged_beside, adapters)), 1) if adapters else 0

    def engines_of(self, name: str) -> "tuple[ModelConfig, ...]":
        """Return `each_engine` of whoever serves the model: for an adapter the base with its engines."""
        return self.models[self.held_by(name)].each_engine()


def load_config(path: str | Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: the file cannot be read, has unknown keys or wrong types, or names an unknown model.
    """
    path = Path(path)
    return parse_config(read_yaml(path) or {}, origin=str(path), base=path.resolve().parent)


def parse_config(raw: Mapping[str, Any], *, origin: str = "configuration", base: Path | None = None) -> Config:
    """Turn a decoded mapping into a `Config`; paths are resolved against `base`.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        config = msgspec.convert(raw, Config, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {explained(str(error), Config)}") from error
    if not config.trainer.model and len(only := config.trained_models()) == 1:
        config = msgspec.structs.replace(config, trainer=msgspec.structs.replace(config.trainer, model=only[0]))
    check(config, origin)
    return _resolve_paths(config, base) if base is not None else config


def check_checkpoint(name: str, model: ModelConfig) -> None:
    """Refuse a checkpoint that is no folder here, which the engine would take for a name on the Hugging Face hub.

    Raises:
        ConfigError: there is no such folder.
    """
    if not Path(model.checkpoint).is_dir():
        raise ConfigError(
            f"models.{name}.checkpoint: there is no folder {model.checkpoint}; "
            "name one in Hugging Face format (config.json, weights, tokenizer)"
        )


def dump_config(config: Config) -> str:
    """Return `config` as YAML: what `--show-config` prints; `parse_config` reads it back to an equal value."""
    return yaml_text(msgspec.to_builtins(config))


def _resolve_paths(config: Config, base: Path) -> Config:
    def absolute(value: str) -> str:
        return str(base / Path(value).expanduser())

    store = config.store
    if store.startswith("sqlite:///") and store != "sqlite:///:memory:":
        store = "sqlite:///" + absolute(store.removeprefix("sqlite:///"))
    models = {name: _resolve_model(model, absolute) for name, model in config.models.items()}
    gate = config.trainer.publish.gate
    if gate is not None:
        app, reward = (absolute(name) if ".py:" in name else name for name in (gate.app, gate.reward))
        gate = msgspec.structs.replace(gate, tasks=absolute(gate.tasks), app=app, reward=reward)
    publish = msgspec.structs.replace(config.trainer.publish, gate=gate)
    trainer = msgspec.structs.replace(config.trainer, output=absolute(config.trainer.output), publish=publish)
    return msgspec.structs.replace(config, store=store, models=models, trainer=trainer)


def _resolve_model(model: ModelConfig, absolute: Any) -> ModelConfig:
    engine = model.engine
    if engine.log is not None:
        engine = msgspec.structs.replace(engine, log=absolute(engine.log))
    checkpoint = absolute(model.checkpoint) if model.checkpoint else ""
    return msgspec.structs.replace(model, checkpoint=checkpoint, engine=engine)


def _replica(engine: EngineConfig, url: str, index: int) -> EngineConfig:
    def fill(text: str) -> str:
        return text.replace("{replica}", str(index))

    log = engine.log
    if log is not None and index:
        log = str(Path(log).with_name(f"{Path(log).stem}-{index}{Path(log).suffix}"))
    return msgspec.structs.replace(
        engine,
        url=url,
        log=log,
        args=tuple(fill(arg) for arg in engine.args),
        env={name: fill(value) for name, value in engine.env.items()},
    )
