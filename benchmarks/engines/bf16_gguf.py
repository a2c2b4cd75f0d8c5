"""The same weights for llama.cpp: a quantised GGUF dequantised tensor by tensor and kept as bf16.

Metadata and llama.cpp's own tensor layout are taken over as they are; vectors (norms) stay fp32, as llama.cpp has them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.core.disk_cache import cache_folder
from cluster.core.errors import ConfigError
from cluster.engine.model_source import gguf_of_package


def gguf_of(source: str) -> Path | None:
    """The GGUF behind a model source, None where it is a folder or a hub id. Raises ``ConfigError``."""
    if source.startswith("pypi:"):
        return gguf_of_package(source.removeprefix("pypi:"))
    path = Path(source).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def as_bf16(file: Path) -> Path:
    """The bf16 sibling of ``file``, written once into the cache."""
    target = cache_folder("models") / f"{file.stem}-{file.stat().st_size}-bf16.gguf"
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            work = target.with_suffix(".part")
            _convert(file, work)
            os.replace(work, target)
    return target


def _convert(file: Path, target: Path) -> None:
    import gguf

    reader: Any = gguf.GGUFReader(file)
    architecture = reader.get_field("general.architecture")
    if architecture is None:
        raise ConfigError(f"model.source: {file} names no general.architecture")
    writer: Any = gguf.GGUFWriter(target, architecture.contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=of)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
