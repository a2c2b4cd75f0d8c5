"""What travels between the doors, the engine and the drafters. Plain frozen data; imports errors and ``stats`` alone.

Vocabulary (docs/round.md has the whole glossary): a *session* is one sequence being generated; *base* is its length
(prompt plus emitted tokens); a *commit* tells drafters which tokens the target emitted.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cluster.core.errors import InvalidArgument
from cluster.core.stats import Health, Load

MAX_SEED = 2**64 - 1
MAX_STOP_CHARS = 1024
MAX_TOKEN_FIELDS = 1024
"""Entries of ``stop_token_ids`` and of ``logit_bias``: each is looked at in every step, which others share."""
LEAST_REPETITION_PENALTY = 0.01  # no logit becomes infinite by it
MAX_PRIORITY = 2**31 - 1
STAGE_NAMES = ("small", "medium")


class Origin(enum.IntEnum):
    """Who proposed a token first. ``TARGET`` marks bonus tokens, which no drafter guessed."""

    TARGET = 0
    SMALL = 1
    MEDIUM = 2


class FinishReason(enum.StrEnum):
    """Why a session ended; values follow OpenAI's and vLLM's names."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


def _require(ok: bool, field_name: str, message: str) -> None:
    if not ok:
        raise InvalidArgument(field_name, message)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen from the target's logits; names and meanings are vLLM's.

    ``seed`` is always resolved (the doors draw one where the client gave none), because output is a function of it.
    ``top_k`` 0 or -1 and ``top_p`` 1.0 mean "no cut". ``logit_bias`` is a tuple of (token id, bias).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature <= 100.0, "temperature", f"{self.temperature} is outside [0, 100]")
        _require(0.0 < self.top_p <= 1.0, "top_p", f"{self.top_p} is outside (0, 1]")
        _require(self.top_k >= -1, "top_k", f"{self.top_k} is below -1 (0 and -1 mean all tokens)")
        _require(0.0 <= self.min_p <= 1.0, "min_p", f"{self.min_p} is outside [0, 1]")
        _require(0 <= self.seed <= MAX_SEED, "seed", f"{self.seed} is outside [0, 2**64 - 1]")
        _require(self.max_tokens >= 1, "max_tokens", f"{self.max_tokens} is below 1")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"{self.min_tokens} is outside [0, max_tokens={self.max_tokens}]",
        )
        _require(len(self.stop) <= 16, "stop", f"{len(self.stop)} stop strings, at most 16")
        _require(
            all(len(text) <= MAX_STOP_CHARS for text in self.stop), "stop", f"more than {MAX_STOP_CHARS} characters"
        )
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            _require(len(ids) <= MAX_TOKEN_FIELDS, name, f"{len(ids)} tokens, at most {MAX_TOKEN_FIELDS}")
        _require(all(self.stop), "stop", "an empty stop string would end every answer at once")
        _require(
            -2.0 <= self.presence_penalty <= 2.0, "presence_penalty", f"{self.presence_penalty} is outside [-2, 2]"
        )
        _require(
            -2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", f"{self.frequency_penalty} is outside [-2, 2]"
        )
        _require(
            LEAST_REPETITION_PENALTY <= self.repetition_penalty <= 2.0,
            "repetition_penalty",
            f"{self.repetition_penalty} is outside [{LEAST_REPETITION_PENALTY}, 2]",
        )
        _require(
            all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias), "logit_bias", "a bias is outside [-100, 100]"
        )

    @property
    def greedy(self) -> bool:
        """True where no noise is added: the token is the warped row's argmax."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True where the warp depends on the tokens so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class Speculation:
    """Per-request control of guessing. It changes speed, never output.

    ``stages``: None lets the engine decide each round; a tuple names the stages to ask, whether they pay or not.
    """

    enabled: bool = True
    max_nodes: int | None = None
    stages: tuple[str, ...] | None = None

    @property
    def engine_chooses(self) -> bool:
        """Whether where guesses come from is left to the engine."""
        return self.enabled and self.stages is None

    def __post_init__(self) -> None:
        if self.max_nodes is not None:
            _require(0 <= self.max_nodes <= 256, "speculation.max_nodes", f"{self.max_nodes} is outside [0, 256]")
        for stage in self.stages or ():
            _require(stage in STAGE_NAMES, "speculation.stages", f"{stage!r} is not one of {', '.join(STAGE_NAMES)}")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation. ``resume_token_ids`` were emitted earlier: they count toward max_tokens, penalties and stops.

    ``priority``: lower is served first, as in vLLM. ``cache_salt``: K/V is reused among requests of equal salt only.
    ``owner``: text that requests of one owner leave behind may draft for that owner's alone; "" is nobody.
    ``trace_parent``: the client's span, as W3C's ``traceparent`` header has it; "" where there is none.
    ``call_id``: tells calls apart whose client uses a request id again; all attempts of one call share it.
    ``admitted``: an earlier attempt was, so this one is not refused, and goes before new requests.
    ``model_key``: of the model and tokenizer it was made for (``ModelInfo.model_key``); "" for whatever there is.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    resume_token_ids: tuple[int, ...] = ()
    speculation: Speculation = Speculation()
    epoch: int = 0
    timeout_s: float | None = None
    priority: int = 0
    cache_salt: str = ""
    owner: str = ""
    trace_parent: str = ""
    call_id: str = ""
    admitted: bool = False
    model_key: str = ""

    def replaces(self, other: GenerateRequest) -> bool:
        """Whether this is a later attempt of the same call."""
        return (self.request_id, self.call_id) == (other.request_id, other.call_id) and self.epoch > other.epoch

    def is_meant_by(self, call_id: str, epoch: int | None) -> bool:
        """Whether an abort of this request id is for this attempt: see ``Engine.abort``."""
        return call_id in ("", self.call_id) and (epoch is None or self.epoch <= epoch)

    def __post_init__(self) -> None:
        _require(abs(self.priority) <= MAX_PRIORITY, "priority", f"{self.priority} is outside +-{MAX_PRIORITY}")


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Totals of one session so far. ``drafted`` counts nodes verified; ``accepted`` excludes bonus tokens."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens_by_origin: tuple[int, int, int] = (0, 0, 0)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per round, bonus tokens included (design's definition: all rounds in the denominator)."""
        return sum(self.tokens_by_origin) / self.rounds if self.rounds else 0.0


@dataclass(frozen=True, slots=True)
class StreamItem:
    """What one session gained in one step. ``position`` is the index of the first token among the output tokens.

    ``text`` is the text delta; it may lag behind the tokens while a stop string or a split character is held back.
    ``seed`` is set on the first item only; ``finish_reason`` on the last. ``cached_tokens``: how many of the prompt's
    tokens had their K/V computed already when the session began.
    """

    request_id: str
    token_ids: tuple[int, ...]
    origins: tuple[Origin, ...]
    position: int
    text: str
    stats: SpeculationStats
    seed: int | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TreeKey:
    """What a tree hangs on. Two outcomes of equal length differ in ``digest``; a restarted session in ``epoch``."""

    session_id: str
    epoch: int
    base: int
    digest: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens the target emitted for a session. ``base`` is the length *before* them; ``key`` names the state after."""

    key: TreeKey
    base: int
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.base + len(self.token_ids) != self.key.base:
            raise ValueError(f"commit of {len(self.token_ids)} tokens at {self.base} does not end at {self.key.base}")


def digest_of(token_ids: Sequence[int] | np.ndarray[Any, Any], digest: int = 0) -> int:
    """Extend a session's 64-bit digest by ``token_ids``, token by token, so that any split gives the same value."""
    for token in token_ids:
        digest = ((digest ^ (int(token) + 0x9E3779B97F4A7C15)) * 0xFF51AFD7ED558CCD) & MAX_SEED
        digest ^= digest >> 32
    return digest


def tokenizer_hash(vocab: dict[str, int]) -> str:
    """A short name for a vocabulary: equal for equal token-to-id maps, whatever library loaded them."""
    body = "\x00".join(f"{token}\x01{index}" for token, index in sorted(vocab.items(), key=lambda item: item[1]))
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What ``/v1/models`` and ``GetModelInfo`` answer."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    dtype: str
    kernels: str
    row_invariant: bool
    stages: tuple[str, ...]
    tokenizer_hash: str

    @property
    def model_key(self) -> str:
        return model_key_of(self.model, self.tokenizer_hash)


def model_key_of(model: str, tokenizer_hash: str) -> str:
    """Tells models apart while one replaces another: ids that were made for one mean nothing to the other."""
    return f"{model} {tokenizer_hash}"


class Engine(Protocol):
    """What the doors know. Implementations: ``TreeEngine``, ``VllmEngine``."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[StreamItem]:
        """Yield items until one carries a finish reason. Raises errors of ``cluster.core.errors``.

        Closing the iterator aborts the session and frees its KV slot within a round.
        """
        ...

    def abort(self, request_id: str, call_id: str = "", epoch: int | None = None) -> bool:
        """End a session; its iterator raises ``Aborted``. False where it is unknown, of another call than ``call_id``,
        or a later attempt than ``epoch``, where these are given."""
        ...

    def info(self) -> ModelInfo: ...

    def load(self) -> Load: ...

    def health(self) -> Health: ...
