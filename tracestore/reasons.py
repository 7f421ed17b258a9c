"""Why sampled tokens are not trained: one table of words, reason -> what it means and what to do.

Every reason that the trainer gives in its account, that conservation finds, and that the proxy quarantines for has its
sentence here, so that the trainer refuses in the words in which `tracegrad doctor` explains. An unknown quarantine
(newer than this table, or of somebody else's proxy) gets a sentence that says so; it refuses nothing else. Called by
`tracegrad.trainer.samples`, `conservation` and the doctor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

OTHER_MODEL = "other model"
NO_ROLE = "no role"
RUN_FAILED = "run failed"
FAILED_CALL = "failed call"
ABORTED = "aborted"
QUARANTINED = "quarantined: "
DELETED = "deleted"
NO_VERSION = "no version"
VERSION_CHANGED = "version changed"
BAD_SPANS = "version spans"
"""Of a choice that several versions sampled nobody knows exactly which token is whose."""
NO_PROMPT = "no prompt ids"
EMPTY = "empty choice"
NO_LOGPROBS = "no logprobs"
LENGTH_MISMATCH = "length mismatch"
NAN_LOGPROB = "nan logprob"
GREEDY = "greedy"
CONSTRAINED = "constrained"
PENALISED = "penalised"
TRUNCATED = "truncated sampling"
NO_REWARD = "no reward"
SUPERSEDED = "superseded by a retry"
"""The answer did not reach the app, which sent the request again: what the app went on with is the retry's answer."""

NO_RUN = "no run"
EVAL = "eval"
LEASED = "leased"
LATE = "arrived after the lease"
OPEN = "open"
OTHER_PURPOSE = "other purpose"
OTHER_ROLE = "other role"
GROUP_TRAINED = "group trained without it"
GROUP_OPEN = "group open"
GROUP_SMALL = "group too small"
GROUP_UNREWARDED = "group awaits rewards"
NO_GROUP = "no group"
GRACE = "in grace time"
OTHER_PROJECT = "other project"
OUTSIDE_WINDOW = "outside the window"
TOO_STALE = "too stale"
NOT_LEASED = "not leased"
REFUSED = "refused"
NO_CALL = "no call"
TRAINED = "trained"


@dataclass(frozen=True, slots=True)
class Words:
    """What a reason means, as a clause that follows "tokens" (or "calls"), and what a person can do about it."""

    means: str
    do: str


_ENGINE = "start the engine with `tracegrad engine`, or compare its vLLM version with the README's"
_REPORT = "`tracegrad show CALL` has the details; if it goes on, update the engine or report it"

REASONS: Mapping[str, Words] = {
    OTHER_MODEL: Words("of calls to another model than the job trains", "nothing: that model's own job takes them"),
    NO_ROLE: Words(
        "of calls without a role",
        "name the role (header, path, `role_rules`), or map `*` to a model under `roles`",
    ),
    RUN_FAILED: Words("of runs that failed", "read the error with `tracegrad show RUN`; a failed run is never trained"),
    FAILED_CALL: Words("of calls that the engine answered with an error", "read it with `tracegrad show CALL`"),
    ABORTED: Words(
        "of calls or answers that were cut off before their end",
        "look for client time-outs and for clients that close streams early; an unfinished answer is never trained",
    ),
    NO_VERSION: Words(
        "sampled while no policy version was known",
        "start `tracegrad train` (it publishes the first version) before the app",
    ),
    VERSION_CHANGED: Words(
        "sampled while the weights were exchanged",
        "let every proxy use this store, so that a publish waits for it (`tracegrad status` lists them)",
    ),
    BAD_SPANS: Words(
        "of answers whose version spans leave tokens out, or name a version that their model does not have", _REPORT
    ),
    NO_PROMPT: Words("of calls without the token ids of their prompt", _ENGINE),
    EMPTY: Words("of answers without a token", "nothing: there is nothing to train in them"),
    NO_LOGPROBS: Words("of answers without the logprobs they were sampled at", _ENGINE),
    LENGTH_MISMATCH: Words("with another number of logprobs than tokens", _REPORT),
    NAN_LOGPROB: Words(
        "with a logprob that is no finite number",
        "look for overflow in the engine (`dtype`, damaged weights): `tracegrad versions` tells since which version",
    ),
    GREEDY: Words(
        "of calls at temperature 0, which are no samples",
        "set `proxy.sampling.'*'.temperature` (for purpose `train`), or a temperature in the app",
    ),
    CONSTRAINED: Words(
        "sampled under a grammar or a forced tool call",
        "nothing, or let the app ask for JSON in words: constrained answers are context only",
    ),
    PENALISED: Words(
        "sampled with penalties or a logit bias",
        "take presence, frequency and repetition penalties and logit_bias out of the app's requests",
    ),
    TRUNCATED: Words(
        "sampled with top-p, top-k or min-p, where what these left is not known whole",
        "if it stays so, the engine tells too few (then the proxy's log says so: start it with `--max-logprobs`, as "
        "large as `proxy.limits.max_kept`); or set `top_k: 12` under `proxy.sampling` (for purpose `train`), or "
        "`top_p: 1.0` and `top_k: 0`; only the last helps where the app asks for logprobs itself",
    ),
    NO_REWARD: Words(
        "that no counted reward reaches",
        "reward the runs (POST /tracegrad/v1/rewards), and compare names and sources with "
        "`trainer.algorithm.credit.reward_weights` and `trainer.batch.runs.reward_sources`",
    ),
    SUPERSEDED: Words("of calls that the client sent again", "nothing: the retry's answer is trained"),
    NO_RUN: Words(
        "of calls that belong to no run",
        "start the app with `tracegrad run`, or send the run in the URL or a header",
    ),
    EVAL: Words("of evaluation runs", "nothing: they are never trained"),
    LEASED: Words("being trained at this moment", "nothing, unless the lease has expired"),
    LATE: Words(
        "that joined their run after it was trained",
        "close runs after their last call, and let LangSmith trees arrive before rewards are given",
    ),
    OPEN: Words("of runs that are still open", "close runs, or wait for `proxy.idle_close_s`"),
    OTHER_PURPOSE: Words("of runs with a purpose the job does not take", "nothing, unless the purpose is wrong"),
    OTHER_PROJECT: Words("of runs of another project than the job's", "nothing: a job of that project takes them"),
    OUTSIDE_WINDOW: Words(
        "of runs opened before or after the time that the job looks at",
        "nothing, unless `trainer.batch.runs.since` or `until` is wrong",
    ),
    GRACE: Words(
        "of runs that ended a moment ago, whose rewards may still come",
        "wait: `trainer.batch.runs.grace_s` says how long",
    ),
    OTHER_ROLE: Words("of roles that the job does not train", "map the role to the job's model under `roles`"),
    GROUP_TRAINED: Words(
        "of runs whose group was trained without them", "end and reward all runs of a group before the next step"
    ),
    GROUP_OPEN: Words(
        "of groups whose planned members have not all ended, or are in their grace time",
        "let the rollout finish; start `tracegrad rollout` again to fill what is missing",
    ),
    GROUP_SMALL: Words(
        "of groups with fewer members that can be trained than the job asks for",
        "look at failed and unrewarded members, or lower `trainer.batch.min_group`",
    ),
    GROUP_UNREWARDED: Words(
        "of groups in which too few members are rewarded yet",
        "reward the other members (POST /tracegrad/v1/rewards)",
    ),
    NO_GROUP: Words(
        "of single runs, which group advantages compare with nobody",
        "sample groups (`tracegrad rollout`), or train with `trainer.algorithm.credit.advantage: gae`",
    ),
    TOO_STALE: Words(
        "sampled by weights older than the job accepts",
        "train more often, raise `trainer.batch.max_staleness`, or train them offline",
    ),
    REFUSED: Words(
        "of batches in which the trainer found nothing to train",
        "see `tracegrad queue --dead` for its reasons; mend them, then train in the next epoch or by another job",
    ),
    NO_CALL: Words("of runs in which no answer was sampled", "make the app call the proxy in this run"),
    TRAINED: Words("that a step trained", "nothing"),
    NOT_LEASED: Words("ready and waiting", "start `tracegrad train`, or wait for enough groups"),
}
"""What the trainer's account and conservation say. `quarantined: X` is looked up in `QUARANTINES`."""

Stage = Literal["ready", "held", "waiting", "trained", "dead", "elsewhere"]
"""Where tokens stand for a job. Dead letters are never trained by it in this epoch, unless what is said of them
changes; what is elsewhere was never meant for the job."""

WAITING = frozenset({OPEN, GRACE, NO_REWARD, GROUP_OPEN, GROUP_UNREWARDED})
ELSEWHERE = frozenset({EVAL, OTHER_MODEL, OTHER_ROLE, OTHER_PURPOSE, OTHER_PROJECT, OUTSIDE_WINDOW})
_STAGES: Mapping[str, Stage] = {
    **dict.fromkeys(WAITING, "waiting"),
    **dict.fromkeys(ELSEWHERE, "elsewhere"),
    NOT_LEASED: "ready",
    LEASED: "held",
    TRAINED: "trained",
}


def stage_of(reason: str, *, accounted: bool = False) -> Stage:
    """Return where tokens with this reason stand; `accounted`: a step gave it, which is final, whatever came since."""
    stage = _STAGES.get(reason, "dead")
    return "dead" if accounted and stage == "waiting" else stage


QUARANTINES: Mapping[str, Words] = {
    NO_PROMPT: Words("without the token ids of their prompt", _ENGINE),
    "no token ids": Words("with an answer without its token ids", _ENGINE),
    NO_LOGPROBS: Words("with an answer without the logprobs it was sampled at", _ENGINE),
    LENGTH_MISMATCH: Words("with another number of logprobs than tokens", _REPORT),
    NAN_LOGPROB: Words("with a logprob that is no finite number", REASONS[NAN_LOGPROB].do),
    "missing logprob": Words("with a token whose logprob the engine left out", _REPORT),
    VERSION_CHANGED: Words("sampled while the weights were exchanged", REASONS[VERSION_CHANGED].do),
    "usage mismatch": Words("whose token counts are not those that the engine says it used", _REPORT),
    "no usage": Words("without the engine's own token counts", _ENGINE),
    "choices missing": Words("with fewer answers than were asked for", _REPORT),
    "no finish reason": Words("whose end the engine did not tell", _REPORT),
    "unreadable chunk": Words("in whose stream a part could not be read", _REPORT),
    "several prompts": Words("with several prompts in one request", "send one prompt a request"),
    "echo": Words("that repeat their prompt in the answer", "leave `echo` out"),
    "reasoning hidden": Words(
        "whose thoughts the client told the engine to withhold", "leave `include_reasoning: false` out"
    ),
    DELETED: Words("whose content was deleted on purpose", "nothing: what was trained of it stays accounted for"),
    "redacted": Words(
        "whose text was masked before it was stored",
        "nothing, if it should be masked; else make the patterns under `redact` narrower",
    ),
}
"""What the proxy quarantines calls for, without the prefix; what they mean, as a clause about calls."""

_UNKNOWN = Words(
    "put aside for a reason that this version does not know", "`tracegrad show CALL` has the details; update"
)


def words_of(reason: str) -> Words:
    """Return the words of a reason of an account; their clause is about tokens."""
    if not reason.startswith(QUARANTINED):
        return REASONS.get(reason, _UNKNOWN)
    words = quarantine_words(reason.removeprefix(QUARANTINED))
    return Words(f"of calls {words.means}", words.do)


def quarantine_words(quarantine: str) -> Words:
    """Return the words of what a call is quarantined for; their clause is about calls."""
    return QUARANTINES.get(quarantine, _UNKNOWN)


def sentences(excluded: Mapping[str, int]) -> list[str]:
    """Return a sentence for each reason (reason -> tokens), the most tokens first: how many, of what, what to do."""
    found = []
    for reason, tokens in sorted(excluded.items(), key=lambda one: (-one[1], one[0])):
        words = words_of(reason)
        found.append(f"{reason}: {tokens} tokens {words.means}; {words.do}")
    return found
