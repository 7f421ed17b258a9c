"""HTTP to one engine (vLLM's OpenAI server with its development endpoints). Standard library only.

Every call opens its own connection: vLLM closes idle ones after 5 s, and these calls are rare. Refuses to guess: an
answer that lacks what was asked for raises. Called by the publisher, the preflight and the engine's watcher; the
training loop's own traffic goes through the proxy instead.

Source: vllm 0.32 `entrypoints/serve/dev`, `entrypoints/rl/online`, `entrypoints/openai/completion`.
"""

import http.client
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from tracegrad.trainer.engine_errors import EngineRefused, EngineUnreachable
from tracegrad.trainer.engine_spans import COMMENT, HEADER

DEV_MODE_HINT = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
_SCORE_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A name the engine answers to. `root` is the checkpoint it was started with."""

    name: str
    root: str
    max_model_len: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reload:
    """How weights were swapped. Without the extension, `tied` and `repacked` are unknown (None)."""

    seconds: float
    extension: bool
    tied: bool | None
    repacked: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One completion as ids with their logprobs; `top` maps token id -> logprob at each position."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[Mapping[int, float], ...]


class EngineClient:
    """One engine at `url`, asked for the model it serves as `name`. Holds no connection and no state."""

    def __init__(self, url: str, name: str, *, timeout_s: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise EngineRefused(f"the engine's url must be http://host:port, not {url!r}")
        self.url = url.rstrip("/")
        self.name = name
        self.timeout_s = timeout_s
        self._host, self._port = parts.hostname, parts.port or 80

    # -- what it is

    def healthy(self, *, timeout_s: float = 5.0) -> bool:
        """Return whether the engine answers `/health` with 200. Never raises for an engine that is down."""
        try:
            self._request("GET", "/health", timeout_s=timeout_s)
        except (EngineUnreachable, EngineRefused):
            return False
        return True

    def models(self) -> list[ServedModel]:
        """Return the names the engine answers to."""
        answer = self._request("GET", "/v1/models")
        return [
            ServedModel(name=m["id"], root=m.get("root") or "", max_model_len=m.get("max_model_len"))
            for m in answer["data"]
        ]

    def version(self) -> str:
        """Return the weight version the engine was last told; vLLM starts with "default"."""
        return str(self._request("GET", "/weight_info")["weight_version"])

    def extension_info(self) -> Mapping[str, Any] | None:
        """Return what our worker extension says (see its `tracegrad_info`), or None where it is not loaded.

        Raises:
            EngineRefused: 404 without development mode.
        """
        try:
            return self._rpc("tracegrad_info", {})[0]
        except EngineRefused as error:
            if "has no attribute" in str(error):
                return None
            raise

    # -- changing it

    def stage(self, path: str) -> None:
        """Prepare the weights at `path` for `swap`, while the engine serves: nothing, where it reads them itself."""

    def unstage(self) -> None:
        """Forget what was prepared."""

    @property
    def is_beside(self) -> bool:
        """Whether it is of weights beside those that serve: they are taken away, and nothing is put back."""
        return False

    def beside(self) -> "EngineClient | None":
        """Return a client for weights beside those that serve, under a name that nobody asks for; None: no room."""
        return None

    def clear_beside(self) -> None:
        """Take away what may be loaded beside what serves."""

    def reload(self, path: str, *, timeout_s: float = 120.0) -> Reload:
        """Load the checkpoint at `path` (a folder the engine can read) in place.

        Uses our worker extension, which re-packs a tied head; without it, vLLM's own `reload_weights`.

        Raises:
            EngineRefused: the engine could not load it; its weights must then be taken for broken.
            EngineUnreachable: no answer in `timeout_s`.
        """
        start = time.monotonic()
        try:
            results = self._rpc("tracegrad_load_weights", {"path": path}, timeout_s=timeout_s)
        except EngineRefused as error:
            if "has no attribute 'tracegrad_load_weights'" not in str(error):
                raise
            self._rpc("reload_weights", {"weights_path": path}, timeout_s=timeout_s)
            return Reload(seconds=time.monotonic() - start, extension=False, tied=None, repacked=None)
        tied, repacked = (all(r[key] for r in results) for key in ("tied", "repacked"))
        return Reload(seconds=time.monotonic() - start, extension=True, tied=tied, repacked=repacked)

    def transfer_step(
        self, step: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> None:
        """Take one step of vLLM's weight-transfer protocol: the name of its path."""
        self._send("POST", f"/{step}", {} if body is None else body, timeout_s=timeout_s)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix: they were computed with the old weights.

        Raises:
            EngineRefused: blocks are still held, so requests are running: the engine was not drained.
        """
        for _ in range(20):
            if self._request("POST", "/reset_prefix_cache", {})["success"]:
                return
            time.sleep(0.05)
        raise EngineRefused(f"{self.url} cannot reset its prefix cache: requests are running on it; drain it first")

    def pause(self) -> None:
        """Stand still: what runs is kept, its cache thrown away. The answer comes when no token is on its way."""
        self._request("POST", "/pause?mode=keep", {})

    def resume(self) -> None:
        """Go on with what was kept."""
        self._request("POST", "/resume", {})

    def tells_versions(self) -> bool:
        """Return whether it says which weights sampled which token, as our middleware (`engine_spans`) does."""
        body = {"model": self.name, "prompt": [1], "max_tokens": 1, "stream": True}
        return COMMENT in self._send("POST", "/v1/completions", body, headers={HEADER.decode(): "1"})

    def set_version(self, version: str) -> None:
        """Tell the engine the version it serves; `/inference/v1/generate` marks each token with it."""
        self._request("POST", "/update_weight_version", {"new_version": version})

    # -- as a publisher sees it; `adapter_client` does the same for an adapter

    @property
    def has_head(self) -> bool:
        """Whether the output head is among the weights that are published."""
        return True

    def swap(self, path: str, mark: str, *, timeout_s: float = 120.0) -> str:
        """Load the weights at `path`, forget every cached prefix, mark them; return the mark that is read back."""
        self.reload(path, timeout_s=timeout_s)
        self.reset_prefix_cache()
        self.set_version(mark)
        return self.version()

    def serves(self, _path: str, mark: str) -> bool:
        """Return whether the engine says that it serves what was marked so."""
        return self.version() == mark

    def disown(self, mark: str) -> None:
        """Say that nobody knows its weights."""
        self.set_version(mark)

    def prove_idle(self) -> None:
        """Reset the prefix cache, which is refused while anything runs. Raises as `reset_prefix_cache`."""
        self.reset_prefix_cache()

    def max_model_len(self) -> int | None:
        """Return how many tokens it takes; None where it does not say."""
        return next((model.max_model_len for model in self.models() if model.name == self.name), None)

    # -- what it computes

    def score(self, ids: Sequence[int], n_prompt: int) -> tuple[float, ...]:
        """Return the engine's logprobs of ``ids[n_prompt:]``, each given all ids before it, at temperature 1."""
        return self.score_many([(ids, n_prompt)])[0]

    def score_many(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, ...]]:
        """Return `score` of each (ids, n_prompt), 16 sequences a request.

        These are prompt logprobs: vLLM applies no temperature, penalty or mask to them, whatever its logprobs mode,
        and does not read its prefix cache for them.

        Raises:
            EngineRefused: a sequence has no prompt, is too long for the engine, or got no finite logprob.
        """
        scores: list[tuple[float, ...]] = []
        for start in range(0, len(sequences), _SCORE_BATCH):
            batch = sequences[start : start + _SCORE_BATCH]
            if any(not 1 <= n < len(ids) for ids, n in batch):
                raise EngineRefused("a scored sequence needs at least one prompt token and one token after it")
            body = {"prompt": [list(ids) for ids, _ in batch], "max_tokens": 1, "prompt_logprobs": 0}
            choices = self._complete({**body, "temperature": 0.0})
            pairs = zip(choices, batch, strict=True)
            scores += [self._scored(choice, ids, n_prompt) for choice, (ids, n_prompt) in pairs]
        return scores

    def score_top(self, ids: Sequence[int], n_prompt: int, top: int) -> tuple[Mapping[int, float], ...]:
        """Return, for each position from `n_prompt` on, the `top` likeliest ids with their T = 1 logprobs."""
        choice = self._complete({"prompt": list(ids), "max_tokens": 1, "prompt_logprobs": top, "temperature": 0.0})[0]
        return tuple(
            {int(token): float(entry["logprob"]) for token, entry in position.items()}
            for position in choice["prompt_logprobs"][n_prompt:]
        )

    def sample(self, ids: Sequence[int], *, max_tokens: int, top: int = 0, **sampling: Any) -> Sampled:
        """Return one completion of the prompt ids. `sampling` goes to vLLM as it is (temperature, seed, ...).

        Raises:
            EngineRefused: the engine gave no token ids, or as many logprobs as not: it cannot be trained from.
        """
        fields = {"logprobs": top, "return_token_ids": True, "return_tokens_as_token_ids": True}
        choice = self._complete({"prompt": list(ids), "max_tokens": max_tokens, **fields, **sampling})[0]
        tokens, logprobs = choice.get("token_ids"), choice.get("logprobs")
        if tokens is None:
            raise EngineRefused(f"{self.url} does not return token ids (return_token_ids): use vLLM >= 0.10.2")
        if logprobs is None or len(logprobs["token_logprobs"]) != len(tokens):
            raise EngineRefused(f"{self.url} does not return one logprob for each token")
        top_maps = tuple(
            {int(token.removeprefix("token_id:")): float(value) for token, value in position.items()}
            for position in logprobs["top_logprobs"]
        )
        return Sampled(token_ids=tuple(tokens), logprobs=tuple(logprobs["token_logprobs"]), top=top_maps)

    # -- the wire

    def _scored(self, choice: Mapping[str, Any], ids: Sequence[int], n_prompt: int) -> tuple[float, ...]:
        positions = choice.get("prompt_logprobs")
        if positions is None or len(positions) != len(ids):
            raise EngineRefused(f"{self.url} does not return prompt logprobs for each token of the prompt")
        values = [positions[i].get(str(ids[i])) for i in range(n_prompt, len(ids))]
        if any(v is None or not math.isfinite(v["logprob"]) for v in values):
            raise EngineRefused(f"{self.url} gave a scored token no finite logprob: its weights are broken")
        return tuple(float(v["logprob"]) for v in values)

    def _complete(self, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        answer = self._request("POST", "/v1/completions", {"model": self.name, **body})
        return sorted(answer["choices"], key=lambda choice: choice["index"])

    def _rpc(self, method: str, kwargs: Mapping[str, str], *, timeout_s: float | None = None) -> list[Any]:
        body = {"method": method, "kwargs": dict(kwargs)}
        return list(self._request("POST", "/collective_rpc", body, timeout_s=timeout_s)["results"])

    def _request(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """Send one request; return the decoded JSON answer (None where it is empty)."""
        raw = self._send(method, path, body, timeout_s=timeout_s)
        try:
            return json.loads(raw) if raw.strip() else None
        except ValueError as error:
            raise EngineRefused(f"the engine at {self.url} answered {path} with something that is not JSON") from error

    def _send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout_s: float | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> bytes:
        """Send one request; return what is answered with 200."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s or self.timeout_s)
        try:
            data = None if body is None else json.dumps(body)
            kind = {"Content-Type": "application/json"} if data else {}
            connection.request(method, path, data, {**kind, **headers})
            response = connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise EngineUnreachable(f"the engine at {self.url} does not answer {path} ({what})") from error
        finally:
            connection.close()
        if response.status != 200:
            raise EngineRefused(self._refusal(path, response.status, raw), status=response.status)
        return raw

    def _refusal(self, path: str, status: int, raw: bytes) -> str:
        text = raw.decode(errors="replace").strip()
        try:
            decoded = json.loads(text)
            text = decoded["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = text[:500]
        hint = f"; {DEV_MODE_HINT}" if status == 404 and not path.startswith("/v1/") else ""
        return f"the engine at {self.url} answered {path} with {status}: {text}{hint}"
