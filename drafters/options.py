"""Options of each drafter: what may stand under ``options`` of a stage, with defaults and limits. No torch.

A new drafter adds its class here; ``drafters.create`` refuses anything a class does not name.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SssdOptions(_Options):
    """Where SSSD looks besides a session's own text: ``store`` is a folder (``drafters/build_store.py`` makes one),
    ``default`` the one shipped for the target's tokenizer, if any, or None."""

    query: int = Field(default=4, ge=1, le=8, description="longest run of newest tokens that is looked up")
    max_tokens: int = Field(default=32_768, ge=64, description="newest tokens of a session that are indexed, at least")
    store: str | None = Field(default="default", description="folder of a datastore, or default")
    chain: bool = Field(default=False, description="the likeliest path alone, for verifiers that take no trees")
    live: bool = Field(
        default=False, description="guess from the same owner's earlier outputs, too; see docs/datastore.md"
    )


class GrowthOptions(_Options):
    """How a model drafter grows a tree. Rows of a session's passes: upstream nodes, then ``expand_per_pass`` each."""

    passes: int = Field(default=4, ge=1, le=32, description="forward passes of one propose, at most")
    expand_per_pass: int = Field(default=4, ge=1, le=64, description="nodes evaluated per pass after the first")
    children: int = Field(default=4, ge=1, le=64, description="likeliest children kept per evaluated node")
    min_score: float = Field(default=0.02, ge=0.0, lt=1.0, description="nodes below it are not evaluated")
    max_upstream: int = Field(default=32, ge=0, le=256, description="nodes taken over from the stage before")
    error_scale: float = Field(default=1.0, gt=0.0, description="see drafters/expand.py")
    keep_scores: bool = Field(default=False, description="upstream's nodes keep the stage before's scores if higher")
    prefill_chunk: int = Field(default=256, ge=1, description="committed tokens of a session computed per propose")

    @property
    def guess_rows(self) -> int:
        """Scratch rows a session's guesses can need in one propose."""
        return self.max_upstream + self.passes * self.expand_per_pass


class DraftModelOptions(GrowthOptions):
    """``translate``: see ``drafters/translated.py``."""

    translate: bool = Field(
        default=False, description="guess through text, for a draft model whose tokenizer is not the target's"
    )


class SwiftOptions(GrowthOptions):
    """``skip``: sub-layers left out (2 * layer: attention, 2 * layer + 1: MLP), or how to choose them:
    ``uniform:COUNT`` an even spread, ``found:COUNT`` the set found beforehand (``drafters/training/search_skip.py``),
    ``search:COUNT`` the same as a start, and better ones searched from the text being generated (in the process of a
    target of one rank only)."""

    skip: str | list[int] = "uniform:12"
    sets: str = Field(default="default", description="folder of sets found beforehand; default: those shipped")
    proposals: Literal["mutate", "random", "bayes"] = Field(
        default="mutate", description="how a search finds sets to try; bayes needs pip install '.[search]'"
    )
    study_rows: int = Field(default=32, ge=16, le=512, description="tokens that a search scores in one step")
    search_seed: int = Field(default=0, ge=0)
    keep_in: str | None = Field(default=None, description="file in which a search is kept from run to run")


class MlpOptions(GrowthOptions):
    """A network on the target's hidden states. ``head``: its folder, or ``default``, the one shipped for the target."""

    head: str = "default"
    passes: int = Field(default=2, ge=1, le=16, description="passes of one propose, at most")
    max_upstream: int = Field(default=24, ge=0, le=256, description="nodes taken over from the stage before")
    keep_scores: bool = Field(default=True, description="upstream's nodes keep the stage before's scores if higher")


class S3DOptions(_Options):
    """Masks and adapters for the target, and what is made of their guesses."""

    adapter: str = Field(
        default="default", description="folder train_s3d.py made, or default: the one shipped for the target"
    )
    gamma: int | None = Field(default=None, ge=1, le=32, description="tokens guessed in a pass; None: all trained for")
    children: int = Field(default=6, ge=1, le=64, description="likeliest tokens of each position that are tried")
    max_upstream: int = Field(default=24, ge=0, le=256, description="nodes taken over from the stage before")
    upstream_rows: int = Field(default=8, ge=0, le=256, description="of these, how many get rows in the pass")
    error_scale: float = Field(default=1.0, gt=0.0, description="see drafters/expand.py")


class StagedOptions(_Options):
    """The two stages, in the form of stage configurations. ``small_nodes``: least size of small's tree."""

    small: dict[str, Any]
    medium: dict[str, Any]
    small_nodes: int = Field(default=16, ge=1, le=256)
