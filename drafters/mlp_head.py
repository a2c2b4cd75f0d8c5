"""The network behind ``MlpSpeculator``: its shape, its form in torch for training, and its folder on disk.

One step, for a token x behind a state s: mix the norms of s and of x's embedding into one row, then residual SwiGLU
blocks; the result is the next state, and the target's own head over its norm says what follows x. The first state is
the target's last hidden state, which is what makes so small a network good at this (after arXiv 2404.19124). Embeddings
and head are the target's; the head is cut to the tokens the target says most.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.core.errors import ConfigError
from drafters.shipped import find_folder, tokenizer_of

HEADER = "head.json"
TENSORS = "head.safetensors"
SCALE = ".scale"
FORMAT = 1


class Block(nn.Module):
    """x + down(silu(gate(norm x)) * up(norm x))."""

    def __init__(self, hidden: int, inner: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        inner = nn.functional.silu(self.gate(normed)) * self.up(normed)
        return x + self.down(inner)  # type: ignore[no-any-return]


class MlpHead(nn.Module):
    """states, embeddings: (n, hidden) -> next states (n, hidden). ``final_norm`` belongs before the head."""

    def __init__(self, hidden: int, inner: int, blocks: int, eps: float) -> None:
        super().__init__()
        self.state_norm, self.token_norm = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        self.mix = nn.Linear(2 * hidden, hidden, bias=False)
        self.blocks = nn.ModuleList(Block(hidden, inner, eps) for _ in range(blocks))
        self.final_norm = nn.RMSNorm(hidden, eps)
        with torch.no_grad():  # at first the state passes through
            self.mix.weight[:, :hidden] = torch.eye(hidden)
            self.mix.weight[:, hidden:].mul_(0.5)
            for block in self.blocks:
                block.down.weight.mul_(0.1)  # type: ignore[union-attr, operator]

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        x = self.mix(torch.cat([self.state_norm(states), self.token_norm(embeddings)], -1))
        for block in self.blocks:
            x = block(x)
        return x  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class HeadHeader:
    """Which target the network belongs to; no hash where that has no ``tokenizer.json``. ``depth``: steps it was
    trained for."""

    tokenizer_hash: str | None
    hidden_size: int
    inner_size: int
    blocks: int
    eps: float
    depth: int
    provenance: dict[str, Any]
    format: int = FORMAT

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The network's tensors, by name."""
        hidden, inner = self.hidden_size, self.inner_size
        sizes: dict[str, tuple[int, ...]] = {"mix.weight": (hidden, 2 * hidden)}
        sizes |= {f"{name}.weight": (hidden,) for name in ("state_norm", "token_norm", "final_norm")}
        for index in range(self.blocks):
            parts = {"norm": (hidden,), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
            sizes |= {f"blocks.{index}.{name}.weight": size for name, size in parts.items()}
        return sizes

    @staticmethod
    def read(folder: Path) -> HeadHeader:
        """Raises ``ConfigError`` where there is none, or one this version cannot read."""
        path = folder / HEADER
        try:
            header = HeadHeader(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"head: {path} does not read: {error}") from None
        if header.format != FORMAT:
            raise ConfigError(f"head: {path} has format {header.format}; allowed: {FORMAT}")
        return header


def save_head(folder: Path, header: HeadHeader, network: MlpHead, head_tokens: Tensor) -> None:
    """Matrices are kept in int8 with a scale for each row, norms in fp32. What stood in ``folder`` is replaced.

    head_tokens: (n,) ids, rising.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"head_tokens": head_tokens.to(torch.int32)}
    for name, value in network.state_dict().items():
        value = value.detach().float().contiguous()
        if value.dim() == 2:
            scale = value.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            tensors[f"{name}{SCALE}"], value = scale, (value / scale).round().to(torch.int8)
        tensors[name] = value
    partial = folder / f".{TENSORS}"
    save_file(tensors, partial)
    os.replace(partial, folder / TENSORS)
    (folder / HEADER).write_text(json.dumps(asdict(header), indent=1) + "\n")


def load_head(folder: Path, target: Path, hidden_size: int) -> tuple[HeadHeader, dict[str, Tensor]]:
    """Header and tensors by name, in fp32. Raises ``ConfigError`` where they are not for the model in ``target``,
    or not of the sizes the header says."""
    header = HeadHeader.read(folder)
    if header.tokenizer_hash != tokenizer_of(target) or header.hidden_size != hidden_size:
        raise ConfigError(f"head: {folder} was made for another model than that in {target}")
    stored = load_file(folder / TENSORS)
    tensors = {name: value for name, value in stored.items() if not name.endswith(SCALE)}
    for name, value in tensors.items():
        if name + SCALE in stored:
            tensors[name] = value.float() * stored[name + SCALE]
    sizes = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name, size in header.sizes().items() if sizes.get(name) != size)
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"head: {folder} has {len(wrong)} tensors of another size than {HEADER} says, among them {name} of"
            f" {sizes.get(name)}; allowed: {header.sizes()[name]}"
        )
    return header, tensors


def find_head(source: str, target: Path) -> Path:
    """``default``: the one shipped for the target's tokenizer. Raises ``ConfigError`` where there is none."""
    return find_folder(
        source,
        f"mlp_head/{HEADER}",
        lambda folder: HeadHeader.read(folder).tokenizer_hash == tokenizer_of(target),
        f"head: none is shipped for the tokenizer of {target}; allowed: a folder made by drafters.training.train_head",
    )
