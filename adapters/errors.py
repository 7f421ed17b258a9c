"""What the app's side raises: client, launcher, wrap. A message says what, which address or id, and what to do.

AdapterError
├── ProxyError             a request to the proxy's own API did not succeed
│   ├── ProxyUnreachable   nobody answers at that address, or not in time
│   ├── ProxyRefused       the proxy says the request is wrong (4xx): `status`, `code`
│   └── ProxyFailed        the proxy cannot do it now (5xx): `status`, `code`
├── NoProxyNamed           it was not said which proxy to talk to
├── RewardFailed           a reward function raised, or returned something that is no reward
└── LaunchError            `tracegrad run` cannot start the command: `exit_code` as a shell would give it

The hook raises none of these: attribution never breaks a request of the app.
"""


class AdapterError(Exception):
    """Root of what the app's side of tracegrad raises."""


class ProxyError(AdapterError):
    """A request to the proxy's own API did not succeed."""


class ProxyUnreachable(ProxyError):
    """Nobody answers at the proxy's address, or not in time."""


class ProxyRefused(ProxyError):
    """The proxy answered 4xx: the request is wrong and repeating it will not help."""

    def __init__(self, message: str, *, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ProxyFailed(ProxyError):
    """The proxy answered 5xx, also after retries."""

    def __init__(self, message: str, *, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class NoProxyNamed(AdapterError):
    """Neither an argument nor the environment says where the proxy is."""


class RewardFailed(AdapterError):
    """A reward function raised or returned something that is no reward: there is no reward then (law 6)."""


class LaunchError(AdapterError):
    """The command of `tracegrad run` cannot be started."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
